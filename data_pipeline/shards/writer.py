"""Writing packed folders: `shard-000000.tar` and so on, a table of members beside each, and at last `index.json`.

The shards are plain WebDataset tars that any tool can read. What the members mean (images, labels, codes) is not known
here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.atomic import atomic_file, bytes_sha256, file_sha256
from data_pipeline.shards.index import Index, Kind, ShardEntry, refuse_complete, shard_name
from data_pipeline.shards.members import MAX_MEMBER_BYTES, MAX_TABLE_BYTES, SUFFIXES, Sample, scan_file

KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")

__all__ = ["MAX_MEMBER_BYTES", "Sample", "write_shard", "write_shards"]


def write_shards(
    samples: Iterable[Sample], folder: Path, *, kind: Kind, meta: dict[str, Any], samples_per_shard: int
) -> Index:
    """Write samples as shards, then their index. Equal samples give equal bytes.

    Raises ValueError if the folder is already packed, or a sample cannot be stored.
    """
    refuse_complete(folder)
    parts = Index(kind, (), meta).record_parts
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, expected at least 1")
    Path(folder).mkdir(parents=True, exist_ok=True)
    stream = iter(samples)
    entries: list[ShardEntry] = []
    for first in stream:  # islice takes the rest of the shard from the same stream
        chunk = chain([first], islice(stream, samples_per_shard - 1))
        entries.append(write_shard(chunk, Path(folder) / shard_name(len(entries)), parts=parts))
    index = Index(kind, tuple(entries), meta)
    index.write(folder)
    return index


def write_shard(samples: Iterable[Sample], path: Path, *, parts: int = 0) -> ShardEntry:
    """Write one tar, and its table of members before it. The tar appears under `path` only when complete.

    parts: in how many parts with a checksum each a member is stored; the `record_parts` of the index it is for.
    Times and owners are fixed, so equal samples give equal bytes. The table is made from the file as it lies on disk.
    """
    from webdataset import TarWriter  # here, because it imports torch, which help and dry runs do not wait for

    num_samples = 0
    with atomic_file(path) as file:
        with TarWriter(file, encoder=False, compress=False, mtime=0, user="", group="") as writer:
            for sample in _storable(samples):
                writer.write({"__key__": sample.key, **sample.members})
                num_samples += 1
        file.flush()
        written = Path(file.name)
        scan = scan_file(written, parts=parts)
        if scan.num_samples != num_samples:
            raise ValueError(f"{path}: {num_samples} samples make {scan.num_samples}; give each a key of its own")
        table_sha256 = write_members(scan.table(), path)
        return ShardEntry(path.name, num_samples, written.stat().st_size, file_sha256(written), table_sha256)


def write_members(table: np.ndarray, shard: Path) -> str:
    """Write the table of members that belongs to a shard, and return its sha256."""
    content = table.tobytes()
    if len(content) > MAX_TABLE_BYTES:
        most = MAX_TABLE_BYTES // table.itemsize
        raise ValueError(f"{shard}: {len(table)} members, at most {most} fit; use more shards")
    with atomic_file(shard.with_suffix(".members")) as file:
        file.write(content)
    return bytes_sha256(content)


def _storable(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Pass samples through. Raises ValueError at the first that no reader would take."""
    for sample in samples:
        if not KEY.fullmatch(sample.key):
            raise ValueError(f"sample key {sample.key!r}, expected 1 to 80 letters, digits, _ and -")
        if not sample.members:
            raise ValueError(f"sample {sample.key!r} has no members, expected at least one")
        for suffix, content in sample.members.items():
            if suffix not in SUFFIXES:
                raise ValueError(f"member {sample.key}.{suffix}, expected one of the suffixes {', '.join(SUFFIXES)}")
            if len(content) > MAX_MEMBER_BYTES:
                raise ValueError(
                    f"member {sample.key}.{suffix} has {len(content)} bytes, at most {MAX_MEMBER_BYTES} fit"
                )
        yield sample
