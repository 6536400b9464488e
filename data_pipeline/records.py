"""Where records lie: members of one kind and size, one a sample, as code shards have them, found many at once.

A table with a row for every member is made for any sample. Here the one member of each sample has a place in arrays
over all shards, so that a whole batch is looked up at once, wherever its samples are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.members import SUFFIXES

# the member's first byte in its shard, its bytes in all, those of them that are headers, and its checksum
COLUMNS = ("start", "span", "headers", "checksum")


@dataclass(frozen=True)
class RecordKind:
    """Which member of a sample is its record, and what is wanted of each: its first bytes, and a part further on."""

    suffix: str
    size: int  # bytes of a record
    head: int  # bytes wanted from its beginning
    part: int  # bytes wanted from an offset on that each record has of its own


class RecordPlaces:
    """The places of all records of one kind in a packed folder, filled in shard by shard."""

    def __init__(self, kind: RecordKind, shard_sizes: Sequence[int]) -> None:
        self.kind = kind
        self._ends = np.cumsum(shard_sizes)
        self._is_known = np.zeros(len(shard_sizes), dtype=bool)
        # One row a sample, or a look-up would wait for memory once a column. Rows not yet written to take no memory.
        self._rows = np.empty((sum(shard_sizes), len(COLUMNS)), dtype=np.uint64)

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """The shard of each sample. ids: (B,) -> (B,)"""
        return np.searchsorted(self._ends, ids, side="right")

    def unknown(self, shards: np.ndarray) -> list[int]:
        """Those of these shards that were not filled in yet, each once."""
        is_known = self._is_known[shards]
        return [] if is_known.all() else np.unique(shards[~is_known]).tolist()

    def fill(self, shard: int, table: np.ndarray, first: list[int]) -> None:
        """Fill in a shard. table, first: its members, and the first row of each sample, then the number of rows."""
        members = table[np.array(first[:-1], dtype=np.int64)]
        headers = members["content"] - members["start"]
        is_record = (np.diff(first) == 1) & (members["suffix"] == SUFFIXES.index(self.kind.suffix))
        is_record &= members["size"] == self.kind.size
        spans = (headers + members["size"]) * is_record
        columns = (members["start"], spans, headers, members["checksum"])
        self._rows[self._ends[shard] - len(members) : self._ends[shard]] = np.stack(columns, axis=1)
        self._is_known[shard] = True

    def find(self, ids: np.ndarray) -> list[list[int]]:
        """The COLUMNS of each sample. ids: (B,), in shards that are filled in. Span 0: it is not one such record."""
        return self._rows[ids].tolist()
