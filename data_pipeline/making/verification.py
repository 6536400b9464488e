"""Check every byte of packed data against its index, and name every fault: before a long run, or after a copy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.files.atomic import open_file_sha256
from data_pipeline.images.decoding import JSON_KEY, image_of, label_of
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import INDEX_NAME, Index, ShardEntry, Storage
from data_pipeline.shards.members import Sample, members_of, part_checksums, read_sample
from data_pipeline.shards.reader import load_members
from data_pipeline.shards.tar import TarFault

MAX_FAULTS = 100  # named in one shard; where there are more, it has to be copied again anyway


NO_FILE = (errno.ELOOP, errno.ENOTDIR)  # what a path leads to, whatever the storage does


@dataclass(frozen=True)
class ShardReport:
    """The faults of one shard, if any, each in one line. samples, bytes: as the index says."""

    place: str
    samples: int
    bytes: int
    faults: list[str]


def verify_shards(storage: Storage, index: Index, *, decode: bool, threads: int) -> Iterator[ShardReport]:
    """Read every shard of a folder, several at once, and report on them in order.

    decode: also decode every image, or unpack every code.
    """
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(partial(_verify_shard, storage, index, decode=decode), index.shards)


def folders_of(location: str) -> list[str]:
    """List a packed folder itself, or those in it (train and val). Raises FileNotFoundError if there are none."""
    storage = Storage(location)
    if storage.is_remote or (Path(location) / INDEX_NAME).exists():
        return [location]
    inside = sorted(path.parent for path in Path(location).glob(f"*/{INDEX_NAME}"))
    if not inside:
        Index.read(storage)  # says what is missing and what to do
    return [str(folder) for folder in inside]


def _verify_shard(storage: Storage, index: Index, shard: ShardEntry, *, decode: bool) -> ShardReport:
    place = storage.place_of(shard)
    try:
        faults = list(_faults(storage, index, shard, decode=decode))
    except (ValueError, OSError) as error:
        is_absent = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in NO_FILE
        if isinstance(error, OSError) and not is_absent:
            raise  # the storage fails, which says nothing of the shard
        faults = [str(error) if place in str(error) else f"{place}: {error}"]
    return ShardReport(place, shard.samples, shard.bytes, faults)


def _faults(storage: Storage, index: Index, shard: ShardEntry, *, decode: bool) -> Iterator[str]:
    place = storage.place_of(shard)
    with os.fdopen(storage.open(shard), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            yield f"{place}: {size} bytes, the index says {shard.bytes}"
        table, first = load_members(storage, shard, parts=index.record_parts)
        is_whole = size == shard.bytes and open_file_sha256(file) == shard.sha256
        named = 0
        if decode or not is_whole:
            for fault in _sample_faults(file.fileno(), table, first, index, decode=decode):
                named += 1
                if named > MAX_FAULTS:
                    yield f"{place}: and more"
                    break
                yield f"{place}: {fault}"
    if size == shard.bytes and not is_whole and not named:
        yield f"{place}: changed where no sample is (sha256); its samples are sound"


def _sample_faults(
    descriptor: int, table: np.ndarray, first: list[int], index: Index, *, decode: bool
) -> Iterator[str]:
    for start, stop in pairwise(first):
        rows = members_of(table[start:stop])
        try:
            sample = read_sample(partial(_read_all, descriptor), rows)
        except TarFault as fault:
            yield str(fault)
            continue
        reason = _part_fault(sample, table[start:stop], index.record_parts)
        if reason or (decode and (reason := _decoding_fault(sample, index))):
            yield f"sample {sample.key}: {reason}"


def _read_all(descriptor: int, position: int, size: int) -> bytes:
    content = os.pread(descriptor, size, position)
    if len(content) != size:
        raise TarFault(f"a member at byte {position} is behind the end of the file")
    return content


def _part_fault(sample: Sample, rows: np.ndarray, parts: int) -> str:
    """Say what is wrong with the checksums of the parts of a sample that is as it was packed; "" if nothing is."""
    if parts and [part_checksums(content, parts) for content in sample.members.values()] != rows["parts"].tolist():
        return "the table of members has other checksums of its views than they have; encode these images again"
    return ""


def _decoding_fault(sample: Sample, index: Index) -> str:
    """Say why the content of a sample cannot be used, though it is as it was packed; "" if it can."""
    try:
        if index.kind == "images":
            image_of(sample)
            label, largest = label_of(sample, index.meta.get("json_label", JSON_KEY)), 0
        else:
            label, largest = _unpack(sample, index)
    except ValueError as error:
        return str(error)
    if label >= len(index.meta["classes"]):
        return f"class {label}, of {len(index.meta['classes'])} classes"
    if index.kind == "codes" and largest >= index.meta["vocab_size"]:
        return f"code {largest}, vocab_size is {index.meta['vocab_size']}"
    return ""


def _unpack(sample: Sample, index: Index) -> tuple[int, int]:
    """Read label and largest code of a record."""
    code_format = CodeFormat(index.meta["num_tokens"], index.meta["views"], index.meta["bits"])
    if code_format.suffix not in sample.members:
        raise ValueError(f"no {code_format.suffix} among the members {sorted(sample.members)}")
    record = sample.members[code_format.suffix]
    unpacked = [code_format.unpack_view(record, view) for view in range(code_format.views)]
    if len(labels := {label for label, _ in unpacked}) > 1:
        raise ValueError(f"its views have several classes, {sorted(labels)}")
    return unpacked[0][0], max(int(codes.max()) for _, codes in unpacked)
