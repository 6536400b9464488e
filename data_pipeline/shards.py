"""Tar shards: write, verify, random access.

A packed folder holds `shard-000000.tar, shard-000001.tar, ...` and `index.json` (see index.py). The shards are plain
WebDataset tars that any tool can read; here they are read by position, with `pread`, so that the order of samples is
free. What the members mean (images, labels, codes) is not known here.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from data_pipeline.files import atomic_file, file_sha256
from data_pipeline.index import Index, Kind, ShardEntry, refuse_complete

BLOCK_BYTES = tarfile.BLOCKSIZE
MAX_MEMBER_BYTES = 64 * 2**20
MAX_OPEN_SHARDS = 256  # well under the usual limit of 1,024 open files per process
MEMBER_NAME = re.compile(r"([A-Za-z0-9_-]{1,80})\.([a-z0-9]{1,16})")


@dataclass(frozen=True)
class Sample:
    """One sample: a key without dots, and its members by suffix without dot ("cls", "png", "vq12")."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class Member:
    """The header of one tar member: where it belongs and how many bytes of content follow the header."""

    key: str
    suffix: str
    size: int

    @property
    def stored_bytes(self) -> int:
        """Header, content, and the padding to whole blocks."""
        return BLOCK_BYTES * (1 + -(-self.size // BLOCK_BYTES))


def write_shards(
    samples: Iterable[Sample], folder: Path, *, kind: Kind, meta: dict[str, Any], samples_per_shard: int
) -> Index:
    """Write `samples` as shards, then their index. Equal samples give equal bytes.

    Raises ValueError if the folder is already packed, or a sample cannot be stored.
    """
    refuse_complete(folder)
    index = Index(kind, write_tars(samples, folder, samples_per_shard=samples_per_shard), meta)
    index.write(folder)
    return index


def write_tars(samples: Iterable[Sample], folder: Path, *, samples_per_shard: int) -> tuple[ShardEntry, ...]:
    """The first half of `write_shards`, for writers that have more to store before the index says "complete"."""
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, expected at least 1")
    Path(folder).mkdir(parents=True, exist_ok=True)
    stream = iter(samples)
    entries: list[ShardEntry] = []
    for first in stream:  # islice takes the rest of the shard from the same stream
        chunk = chain([first], islice(stream, samples_per_shard - 1))
        entries.append(write_shard(chunk, Path(folder) / f"shard-{len(entries):06d}.tar"))
    return tuple(entries)


def write_shard(samples: Iterable[Sample], path: Path) -> ShardEntry:
    """Write one tar that appears under `path` only when complete. Times and owners are fixed: equal bytes every run."""
    num_samples = 0
    with atomic_file(path) as file:
        with TarWriter(file, encoder=False, compress=False, mtime=0, user="", group="") as writer:
            for sample in samples:
                _check_storable(sample)
                writer.write({"__key__": sample.key, **sample.members})
                num_samples += 1
    return ShardEntry(path.name, num_samples, path.stat().st_size, file_sha256(path))


def _check_storable(sample: Sample) -> None:
    if not sample.members:
        raise ValueError(f"sample {sample.key!r} has no members, expected at least one")
    for suffix, content in sample.members.items():
        if not MEMBER_NAME.fullmatch(f"{sample.key}.{suffix}"):
            raise ValueError(f"member name '{sample.key}.{suffix}', expected key.suffix of letters, digits, _, -")
        if len(content) > MAX_MEMBER_BYTES:
            raise ValueError(f"member {sample.key}.{suffix} has {len(content)} bytes, at most {MAX_MEMBER_BYTES} fit")


class ShardReader:
    """Random access to the samples of a packed folder, numbered from 0 through all shards.

    Shards are opened and scanned at their first use, in each process for itself, so a reader may be sent to worker
    processes by fork or spawn. Not for several threads at once. Everything that does not match the index is an error
    that names the shard; nothing is skipped.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        """Raises FileNotFoundError for a missing shard, ValueError for one of the wrong size."""
        self.folder = Path(folder)
        self.index = index
        self._descriptors: dict[int, int] = {}  # shard number -> open file
        self._offsets: dict[int, np.ndarray] = {}  # shard number -> first byte of each sample, then of the tar's end
        self._first_ids = np.cumsum([0] + [shard.samples for shard in index.shards])
        for shard in index.shards:
            self._check_size(shard)

    def __len__(self) -> int:
        return self.index.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the open files. Reading opens them again."""
        for descriptor in self.__dict__.pop("_descriptors", {}).values():
            os.close(descriptor)
        self._descriptors = {}

    def read(self, sample_id: int) -> Sample:
        """The sample with this number. Raises ValueError, naming the shard, if its bytes do not form one."""
        number, row = self._locate(sample_id)
        offsets = self._sample_offsets(number)
        start, stop = int(offsets[row]), int(offsets[row + 1])
        blob = self._read_bytes(number, start, stop - start)
        members: dict[str, bytes] = {}
        position = 0
        while position < len(blob):
            member = self._parse_header(number, blob[position : position + BLOCK_BYTES], start + position)
            content = position + BLOCK_BYTES
            members[member.suffix] = blob[content : content + member.size]
            position += member.stored_bytes
        if position != len(blob):
            raise self._damaged(number, f"the sample at byte {start} changed while it was being read")
        return Sample(member.key, members)

    def path_of(self, sample_id: int) -> Path:
        """The shard that holds this sample, for error messages."""
        return self._path(self._locate(sample_id)[0])

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the index. Raises ValueError naming the first that differs."""
        for shard in self.index.shards:
            self._check_size(shard)
            path = self.folder / shard.name
            found = file_sha256(path)
            if found != shard.sha256:
                raise ValueError(f"{path}: sha256 is {found}, the index says {shard.sha256}; copy or pack it again")

    def _check_size(self, shard: ShardEntry) -> None:
        path = self.folder / shard.name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such shard, but the index lists it; copy or pack it again")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"{path}: {size} bytes, the index says {shard.bytes}; copy or pack it again")

    def _path(self, number: int) -> Path:
        return self.folder / self.index.shards[number].name

    def _damaged(self, number: int, what: str) -> ValueError:
        return ValueError(f"{self._path(number)}: damaged shard, {what}; copy or pack it again")

    def _locate(self, sample_id: int) -> tuple[int, int]:
        assert 0 <= sample_id < len(self), f"sample {sample_id} of {len(self)}"
        number = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        return number, int(sample_id - self._first_ids[number])

    def _sample_offsets(self, number: int) -> np.ndarray:
        if number not in self._offsets:
            self._offsets[number] = self._scan(number)
        return self._offsets[number]

    def _scan(self, number: int) -> np.ndarray:
        """Walk the headers of one shard and return where each sample starts and the last one stops."""
        starts: list[int] = []
        key, position = None, 0
        suffixes: set[str] = set()
        for position, member in self._members(number):
            if member.key != key:
                starts.append(position)
                key, suffixes = member.key, set()
            if member.suffix in suffixes:
                raise self._damaged(number, f"two members {key}.{member.suffix}")
            suffixes.add(member.suffix)
            position += member.stored_bytes
        expected = self.index.shards[number].samples
        if len(starts) != expected:
            raise self._damaged(number, f"{len(starts)} samples found, the index says {expected}")
        return np.array([*starts, position], dtype=np.int64)

    def _members(self, number: int) -> Iterator[tuple[int, Member]]:
        """Every member of one shard with its offset, up to the zero block that ends a tar."""
        position = 0
        while any(header := self._read_bytes(number, position, BLOCK_BYTES)):
            member = self._parse_header(number, header, position)
            yield position, member
            position += member.stored_bytes

    def _parse_header(self, number: int, header: bytes, position: int) -> Member:
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise self._damaged(number, f"no tar header at byte {position} ({error})") from error
        name = MEMBER_NAME.fullmatch(info.name)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or name is None:
            raise self._damaged(number, f"{info.name!r} at byte {position} is not a plain file named key.suffix")
        if not 0 <= info.size <= MAX_MEMBER_BYTES:
            raise self._damaged(number, f"{info.name} claims {info.size} bytes, more than {MAX_MEMBER_BYTES}")
        return Member(name[1], name[2], info.size)

    def _read_bytes(self, number: int, position: int, size: int) -> bytes:
        content = os.pread(self._descriptor(number), size, position)
        if len(content) != size:
            raise self._damaged(number, f"it ends at byte {position + len(content)} inside a sample")
        return content

    def _descriptor(self, number: int) -> int:
        if number not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[number] = os.open(self._path(number), os.O_RDONLY)
        return self._descriptors[number]
