"""Where records lie: members of one kind and size, one a sample, as code shards have them, found many at once.

A table with a row for every member is made for any sample. Here the one member of each sample has a place in arrays
over all shards, so that a whole batch is looked up at once, wherever its samples are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.members import SUFFIXES

NOT_ALONE = 255  # in the place of a suffix: a sample with several members


@dataclass(frozen=True)
class RecordKind:
    """Which member of a sample is its record, and what is wanted of each: its first bytes, and a part further on."""

    suffix: str
    size: int  # bytes of a record
    head: int  # bytes wanted from its beginning
    part: int  # bytes wanted from an offset on that each record has of its own


@dataclass(frozen=True)
class Pieces:
    """What is read of each of B samples, as lists (B,). A span of 0: this sample is not one such record."""

    shards: list[int]
    starts: list[int]  # in the shard, of the headers
    spans: list[int]  # from there to the end of the content
    contents: list[int]  # from there to its beginning
    checksums: list[int]


class RecordPlaces:
    """The places of all records of a packed folder, filled in shard by shard."""

    def __init__(self, shard_sizes: list[int]) -> None:
        num_samples = sum(shard_sizes)
        self._ends = np.cumsum(shard_sizes)
        self._is_known = np.zeros(len(shard_sizes), dtype=bool)
        self._suffixes = np.empty(num_samples, dtype=np.uint8)  # memory that is not written to takes no room
        self._starts = np.empty(num_samples, dtype=np.int64)
        self._spans = np.empty(num_samples, dtype=np.int64)
        self._contents = np.empty(num_samples, dtype=np.int32)
        self._checksums = np.empty(num_samples, dtype=np.uint64)

    def unknown_shards(self, ids: np.ndarray) -> list[int]:
        """The shards of these samples that were not filled in yet."""
        shards = np.searchsorted(self._ends, ids, side="right")
        return np.unique(shards[~self._is_known[shards]]).tolist()

    def fill(self, shard: int, table: np.ndarray, first: list[int]) -> None:
        """Fill in a shard. table, first: its members, and the first row of each sample, then the number of rows."""
        rows = np.array(first[:-1], dtype=np.int64)
        part = slice(self._ends[shard] - len(rows), self._ends[shard])
        starts, contents = (table[name][rows].astype(np.int64) for name in ("start", "content"))
        self._suffixes[part] = np.where(np.diff(first) == 1, table["suffix"][rows], NOT_ALONE)
        self._starts[part] = starts
        self._spans[part] = contents - starts + table["size"][rows]
        self._contents[part] = contents - starts
        self._checksums[part] = table["checksum"][rows]
        self._is_known[shard] = True

    def find(self, ids: np.ndarray, kind: RecordKind) -> Pieces:
        """ids: (B,), in shards that are filled in."""
        spans, contents = self._spans[ids], self._contents[ids]
        is_record = (self._suffixes[ids] == SUFFIXES.index(kind.suffix)) & (spans - contents == kind.size)
        return Pieces(
            shards=np.searchsorted(self._ends, ids, side="right").tolist(),
            starts=self._starts[ids].tolist(),
            spans=(spans * is_record).tolist(),
            contents=contents.tolist(),
            checksums=self._checksums[ids].tolist(),
        )
