"""Finding the records of a whole batch at once, wherever its samples lie.

A record is the one member of a sample in a code shard; all records have one size. Arrays over all shards hold where
each lies, so that a batch is looked up without a loop over tables of members. A record has equal parts, each with a
checksum of its own, and is read one part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.shards.members import SUFFIXES

NOWHERE = 0  # in place of a record's first byte: no record is where a shard's first header is


@dataclass(frozen=True)
class RecordKind:
    """The member of a sample that is its record, and in how many equal parts it is read."""

    suffix: str
    size: int  # bytes of a record
    parts: int

    @property
    def part_bytes(self) -> int:
        """The bytes of one part."""
        return self.size // self.parts


class RecordPlaces:
    """The places of all records of one kind in a packed folder, filled in shard by shard.

    A record takes 8 bytes and 8 for each of its parts: 175 MB for 1.28 million of 16 parts.
    """

    def __init__(self, kind: RecordKind, shard_sizes: Sequence[int]) -> None:
        """Make room for the places of all records. Raises ValueError if memory cannot hold them."""
        self.kind = kind
        self._ends = np.cumsum(shard_sizes)
        self._is_known = np.zeros(len(shard_sizes), dtype=bool)
        number = sum(shard_sizes)
        try:  # Rows of zeros, which is NOWHERE, take no memory before their shard is filled in.
            self._starts = np.zeros(number, dtype=np.int64)
            self._checksums = np.zeros((number, kind.parts), dtype=np.uint64)
        except MemoryError:
            size = number * 8 * (1 + kind.parts) / 1e9
            reason = f"the places of {number} samples with {kind.parts} views take {size:,.0f} GB of memory"
            raise ValueError(f"{reason}, more than there is; split the folder, or store fewer views") from None

    def shards_of(self, ids: np.ndarray) -> np.ndarray:
        """Find the shard of each sample. ids: (B,) -> (B,)"""
        return np.searchsorted(self._ends, ids, side="right")

    def unknown(self, shards: np.ndarray) -> list[int]:
        """Return those of these shards that were not filled in yet, each once."""
        is_known = self._is_known[shards]
        return [] if is_known.all() else np.unique(shards[~is_known]).tolist()

    def fill(self, shard: int, table: np.ndarray, first: list[int]) -> None:
        """Fill in a shard. table: its members; first: the first row of each sample, then the number of rows."""
        members = table[np.array(first[:-1], dtype=np.int64)]
        is_record = (np.diff(first) == 1) & (members["suffix"] == SUFFIXES.index(self.kind.suffix))
        is_record &= members["size"] == self.kind.size
        own = slice(self._ends[shard] - len(members), self._ends[shard])
        self._starts[own] = np.where(is_record, members["content"], NOWHERE)
        self._checksums[own] = members["parts"]
        self._is_known[shard] = True

    def find(self, ids: np.ndarray, parts: np.ndarray) -> tuple[list[int], list[int]]:
        """Return the first byte of one part of each record, and its checksum. ids, parts: (B,).

        A sample that is not one such record is NOWHERE. The samples must be in shards that are filled in.
        """
        records = self._starts[ids]
        starts = np.where(records == NOWHERE, NOWHERE, records + parts * self.kind.part_bytes)
        return starts.tolist(), self._checksums[ids, parts].tolist()
