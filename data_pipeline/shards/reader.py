"""Reading samples from shards by number, with every byte that is handed on checked against the index.

Shards are read by position, with `pread`, so that the order of samples is free. The table of members says where each
lies; nothing that a damaged tar claims is believed.
"""

from __future__ import annotations

import os
import resource
from bisect import bisect_right
from collections.abc import Callable
from copy import copy
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.atomic import bytes_sha256, open_file_sha256
from data_pipeline.files.damage import DamagedData, DamagedShard
from data_pipeline.shards.index import Index, ShardEntry, Storage
from data_pipeline.shards.members import (
    MAX_MEMBER_BYTES,
    MAX_TABLE_BYTES,
    SUFFIXES,
    Sample,
    checksum_of,
    members_of,
    read_sample,
    row_type,
)
from data_pipeline.shards.records import NOWHERE, RecordKind, RecordPlaces
from data_pipeline.shards.tar import BLOCK_BYTES, TarFault

FEWEST_OPEN_SHARDS = 64
AGAIN = "copy or pack it again"


class ShardReader:
    """Random access to the samples of a packed folder, numbered from 0 through all shards.

    Shards are opened at their first use, in each process for itself, so a reader may be sent to worker processes by
    fork or spawn. It is not for several threads at once: each takes a `twin`. What is asked for and does not match the
    index is an error that names shard and member; nothing is skipped.
    """

    def __init__(self, folder: str | Path | Storage, index: Index, *, check: bool = True) -> None:
        """Check that all shards are there. check: compare what is read with its checksum; off to measure its cost.

        Raises FileNotFoundError for a missing shard, DamagedData for one of the wrong size.
        """
        self.storage = Storage.of(folder)
        self.index = index
        self.check = check
        self._first_ids = [0, *accumulate(shard.samples for shard in index.shards)]
        self._descriptors: dict[int, int] = {}  # shard number -> open file
        self._most_open = most_open_shards()
        self._tables: dict[int, tuple[np.ndarray, list[int]]] = {}  # shard number -> rows, first row of each sample
        self._places: RecordPlaces | None = None
        self.storage.check_sizes(index.shards)

    def __len__(self) -> int:
        return self._first_ids[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}, "_places": None}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the open files. Reading opens them again."""
        for descriptor in self.__dict__.pop("_descriptors", {}).values():
            os.close(descriptor)
        self._descriptors = {}

    def twin(self) -> ShardReader:
        """Return another reader of the same shards for another thread, with open files of its own."""
        other = copy(self)
        other._places = self._places
        return other

    def read(self, sample_id: int) -> Sample:
        """Read one sample whole. Raises DamagedData, naming shard and member, if its bytes changed."""
        number, sample = self.locate(sample_id)
        if number not in self._tables:
            self._tables[number] = self._load_members(number)
        table, first = self._tables[number]
        rows = members_of(table[first[sample] : first[sample + 1]])
        try:
            return read_sample(partial(self._read_bytes, number), rows, check=self.check)
        except TarFault as fault:
            if self._drop_bad_copy(number):
                return self.read(sample_id)
            raise self._damaged(number, str(fault)) from fault

    def read_records(
        self, ids: np.ndarray, parts: np.ndarray, kind: RecordKind, *, otherwise: Callable[[int], bytes]
    ) -> np.ndarray:
        """Read one part of each of B records, checked. ids, parts: (B,) -> (B, kind.part_bytes) uint8.

        `otherwise` is called for a sample that is not one such member or cannot be read: it makes the whole record, or
        raises what is wrong with it.
        """
        assert parts.min() >= 0 and parts.max() < kind.parts, f"parts {parts} of {kind.parts}"
        places = self._places_of(kind)
        shards = places.shards_of(ids)
        for shard in places.unknown(shards):
            places.fill(shard, *self._load_members(shard))
        opened, size = self._descriptors, kind.part_bytes
        pieces: list[bytes] = []
        for row, (shard, start, checksum) in enumerate(zip(shards.tolist(), *places.find(ids, parts))):
            descriptor = opened.get(shard) or self._descriptor(shard)
            try:
                piece = os.pread(descriptor, size, start)
            except OSError:  # comes again, with words, when the sample is read by itself
                piece = b""
            if start == NOWHERE or len(piece) != size or (self.check and checksum_of(piece) != checksum):
                begin = int(parts[row]) * size
                piece = otherwise(int(ids[row]))[begin : begin + size]
            pieces.append(piece)
        return np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(len(ids), size)

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Return the number of the shard that holds a sample, and the sample's number within it."""
        assert 0 <= sample_id < self._first_ids[-1], f"sample {sample_id} of {len(self)}"
        number = bisect_right(self._first_ids, sample_id) - 1
        return number, int(sample_id) - self._first_ids[number]

    def neighbours(self, sample_id: int) -> range:
        """Return the numbers of all samples in the shard of this one."""
        number, _ = self.locate(sample_id)
        return range(self._first_ids[number], self._first_ids[number + 1])

    def shard_of(self, sample_id: int) -> ShardEntry:
        """Return what the index says of the shard that holds a sample."""
        return self.index.shards[self.locate(sample_id)[0]]

    def path_of(self, sample_id: int) -> str:
        """Name the shard that holds a sample in a message."""
        return self.storage.place_of(self.shard_of(sample_id))

    def _places_of(self, kind: RecordKind) -> RecordPlaces:
        assert kind.parts == self.index.record_parts, f"{kind} of records that have {self.index.record_parts} parts"
        if self._places is None or self._places.kind != kind:
            self._places = RecordPlaces(kind, [shard.samples for shard in self.index.shards])
        return self._places

    def _drop_bad_copy(self, number: int) -> bool:
        """Remove a cached copy that is not what was fetched. False: it is, or the shard is not a copy."""
        shard = self.index.shards[number]
        if not self.storage.is_remote_shard(shard):
            return False
        with os.fdopen(self.storage.open(shard), "rb") as file:
            if open_file_sha256(file) == shard.sha256:
                return False
        self.storage.cache.drop(shard.sha256)
        os.close(self._descriptors.pop(number))
        return True

    def _damaged(self, number: int, what: str) -> DamagedData:
        return DamagedData(f"{self.storage.place_of(self.index.shards[number])}: damaged shard, {what}; {AGAIN}")

    def _load_members(self, number: int) -> tuple[np.ndarray, list[int]]:
        return load_members(self.storage, self.index.shards[number], parts=self.index.record_parts)

    def _read_bytes(self, number: int, position: int, size: int) -> bytes:
        descriptor = self._descriptor(number)
        try:
            content = os.pread(descriptor, size, position)
        except OSError as error:
            place = self.storage.place_of(self.index.shards[number])
            raise OSError(error.errno, f"{error.strerror} at byte {position}", place) from error
        if len(content) != size:
            raise self._damaged(number, f"it ends at byte {position + len(content)} inside a sample")
        return content

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            shard = self.index.shards[number]
            if self.storage.is_remote_shard(shard):
                self._close_removed()
            if len(self._descriptors) >= self._most_open:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[number] = self.storage.open(shard)
        return self._descriptors[number]

    def _close_removed(self) -> None:
        """Close what the cache has removed meanwhile: as long as it is open it takes room on disk."""
        removed = [number for number, open_file in self._descriptors.items() if not os.fstat(open_file).st_nlink]
        for number in removed:
            os.close(self._descriptors.pop(number))


def most_open_shards() -> int:
    """Return how many shards a reader keeps open: a quarter of what `ulimit -n` allows, as a run has several readers.

    Where there are more shards, each sample from one that is not open costs the opening of a file.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(FEWEST_OPEN_SHARDS, (2**20 if allowed == resource.RLIM_INFINITY else allowed) // 4)


def load_members(storage: Storage, shard: ShardEntry, *, parts: int) -> tuple[np.ndarray, list[int]]:
    """Load a shard's table of members: its rows, and the first row of each sample followed by the number of rows.

    parts: the index's `record_parts`. Raises FileNotFoundError if the table is missing, DamagedShard if it is not the
    one that the index seals or is one that no writer makes.
    """
    place, row_dtype = storage.place_of(shard.members_name), row_type(parts)
    most = min(shard.samples * len(SUFFIXES) * row_dtype.itemsize, MAX_TABLE_BYTES)
    content = storage.read_small(shard.members_name, max_bytes=most)
    if bytes_sha256(content) != shard.members_sha256:
        raise DamagedShard(f"{place}: damaged, its sha256 is not the one in the index; {AGAIN}")
    if len(content) % row_dtype.itemsize or len(content) < shard.samples * row_dtype.itemsize:
        raise DamagedShard(f"{place}: {len(content)} bytes, which is no table of {shard.samples} samples; {AGAIN}")
    table = np.frombuffer(content, dtype=row_dtype)
    if fault := _table_fault(table, shard):
        raise DamagedShard(f"{place}: {fault}; {AGAIN}")
    return table, np.searchsorted(table["sample"], np.arange(shard.samples + 1)).tolist()


def _table_fault(table: np.ndarray, shard: ShardEntry) -> str:
    """Say why no writer makes a table like this one, though it has the stated sha256; nothing if a writer may."""
    starts, contents, sizes = (table[name].astype(np.int64) for name in ("start", "content", "size"))
    ends = contents + sizes
    numbers = table["sample"].astype(np.int64)
    if not np.array_equal(np.unique(numbers), np.arange(shard.samples)) or (np.diff(numbers) < 0).any():
        return f"does not list the samples 0 to {shard.samples - 1} in order"
    if (table["suffix"] >= len(SUFFIXES)).any() or (sizes > MAX_MEMBER_BYTES).any():
        return "lists a member of an unknown kind or size"
    is_far = (contents - starts < BLOCK_BYTES) | (contents - starts > 2**20) | (starts < 0) | (ends > shard.bytes)
    if is_far.any() or (starts[1:] < ends[:-1]).any():
        return "lists members that overlap or lie outside of the shard"
    return ""
