"""Index WebDataset tars that somebody else has packed, which stay where they are, as they are.

Each tar is read from its first to its last byte. What follows is the same as for shards packed here: sizes are
checked before a run starts, and every member when it is read. A sample without exactly one image, or without a class,
is left out of the table, and listed with the reason; a tar that is damaged is an error.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from data_pipeline.files.atomic import atomic_file, atomic_folder, file_sha256
from data_pipeline.files.damage import DamagedData
from data_pipeline.files.urls import check_location, is_url, without_query
from data_pipeline.images.decoding import IMAGE_SUFFIXES, decode_image, label_of
from data_pipeline.making.sources import ALL
from data_pipeline.remote.cache import ShardCache
from data_pipeline.shards.index import Index, ShardEntry, refuse_complete, refuse_query, regular_size, shard_name
from data_pipeline.shards.members import MAX_KINDS, OTHER_KINDS, Sample, Scan, scan_file, split_name
from data_pipeline.shards.tar import TarFault
from data_pipeline.shards.writer import write_members

MAX_LISTED = 10_000  # samples left out that are named; all are counted
MAX_SHARDS = 50_000  # an index of them has 15 MB
MAX_LIST_BYTES = 64 * 2**20
NUMBERS = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
LETTERS = re.compile(r"\{([A-Za-z])\.\.([A-Za-z])(?:\.\.-?\d+)?\}")
NESTED = re.compile(r"\{[^{}]*\{")
MAX_PATTERN = 4096  # characters
CHOICES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """List the tars that patterns stand for, in order, as absolute paths and URLs.

    A pattern is a path or URL, with {000..127} or {a,b} for several; a folder, for the .tar files in it; or a .txt
    file with one pattern in each line. Raises FileNotFoundError for what is not there, ValueError for other schemes,
    braces that do not match, a tar named twice, or more than MAX_SHARDS.
    """
    found = list(islice(_expand(patterns), MAX_SHARDS + 1))
    if len(found) > MAX_SHARDS:
        raise ValueError(f"shards names more than {MAX_SHARDS} tars; index them in parts")
    if not found:
        raise ValueError(f"shards is {', '.join(patterns)[:200]}, which names no tar; give paths or URLs of .tar files")
    repeated = [place for place, count in Counter(found).items() if count > 1]
    if repeated:
        raise ValueError(f"shards names {without_query(repeated[0])} twice; name each tar once")
    return found


def _expand(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN or NESTED.search(pattern):
            raise ValueError(f"shards has {pattern[:100]!r}: braces within braces, or too long; write it in parts")
        if _count(pattern) > MAX_SHARDS:  # before anything counts that far
            raise ValueError(f"shards has {pattern[:100]!r}, more than {MAX_SHARDS} tars; index them in parts")
        try:
            yield from (place for one in braceexpand(pattern) for place in _places(one))
        except UnbalancedBracesError:
            raise ValueError(f"shards is {pattern[:200]!r}, whose braces do not match; write {{000..127}}") from None


def _count(pattern: str) -> int:
    """Count the places that a pattern stands for."""
    letters = [abs(ord(last) - ord(first)) + 1 for first, last in LETTERS.findall(pattern)]
    ranges = [abs(int(last[:20]) - int(first[:20])) + 1 for first, last in NUMBERS.findall(pattern)]
    return math.prod([*ranges, *letters, *(choices.count(",") + 1 for choices in CHOICES.findall(pattern))])


def _places(one: str) -> list[str]:
    check_location(one)
    if is_url(one):
        refuse_query(one)
        return [one]
    path = Path(one).absolute()
    if path.is_dir():
        return [str(file) for file in sorted(path.glob("*.tar"))]
    if path.suffix == ".txt":
        if regular_size(path) > MAX_LIST_BYTES:
            raise ValueError(f"{path}: {regular_size(path)} bytes, a list of shards has at most {MAX_LIST_BYTES}")
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        listed = [line for line in lines if line and not line.startswith("#")]
        if any(line.endswith(".txt") for line in listed):
            raise ValueError(f"{path}: names another list; a list of shards names .tar files")
        return list(_expand(listed))
    regular_size(path)
    return [str(path)]


@dataclass
class Indexing:
    """The indexing of tars one by one, and what was found in them.

    entries: of the tars read so far. skipped: tar, key and reason of each sample left out. ignored: how many members
    of each kind were not read.
    """

    out: Path
    cache: ShardCache
    json_label: str | None  # none: the pictures have no classes
    num_classes: int | None  # none: as many as are found
    decode: bool
    entries: list[ShardEntry] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    num_skipped: int = 0  # skipped lists the first MAX_LISTED of them
    ignored: Counter[str] = field(default_factory=Counter)
    largest_label: int = -1

    def add(self, location: str) -> ShardEntry:
        """Read a whole tar and write its table. Raises DamagedData if it is not a sound tar."""
        place = without_query(location)
        path = self.cache.fetch_new(location) if is_url(location) else Path(location)
        regular_size(path)
        before = os.stat(path)
        is_good: list[bool] = []  # of each sample

        def visit(sample: Sample) -> None:
            reason = self._fault(sample)
            is_good.append(not reason)
            if reason:
                self._skip(place, sample.key, reason)

        try:
            scan = scan_file(path, visit)
        except TarFault as fault:
            what = str(fault).removeprefix(f"{path}: ")
            raise DamagedData(f"{place}: {what}; copy it again, or leave it out") from None
        for kind, count in scan.ignored.items():
            self.ignored[kind if kind in self.ignored or len(self.ignored) < MAX_KINDS else OTHER_KINDS] += count
        for picture in scan.lost_pictures():
            suffix = split_name(picture)[1]
            self._skip(place, picture, f"its suffix is {suffix}, all after the first dot; rename it without that dot")
        name = shard_name(len(self.entries))
        table_sha256 = write_members(_table_of(scan, is_good), self.out / name)
        entry = ShardEntry(name, sum(is_good), scan.total, file_sha256(path), table_sha256, location)
        after = os.stat(path)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DamagedData(f"{place}: changed while it was read; start again when it is at rest")
        self.entries.append(entry)
        return entry

    def _skip(self, place: str, key: str, reason: str) -> None:
        self.num_skipped += 1
        if len(self.skipped) < MAX_LISTED:
            self.skipped.append({"shard": place, "key": key, "reason": reason})

    def finish(self, patterns: Sequence[str]) -> Index:
        """Write what was left out, then the index. Raises ValueError if there is nothing to index."""
        if not sum(entry.samples for entry in self.entries):
            first = f", the first: {self.skipped[0]['key']}: {self.skipped[0]['reason']}" if self.skipped else ""
            raise ValueError(
                f"{', '.join(patterns)[:200]}: no sample with one image and one class{first}; "
                "pictures without classes are indexed with labels=false"
            )
        num_classes = self.num_classes or self.largest_label + 1
        with atomic_file(self.out / "skipped.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.skipped)
        meta = {
            "classes": [ALL] if self.json_label is None else [str(label) for label in range(num_classes)],
            "json_label": self.json_label,
            "decoded": self.decode,
            "encoding": "as found",
            "skipped": self.num_skipped,
            "ignored_members": dict(sorted(self.ignored.items())),
        }
        index = Index("images", tuple(self.entries), meta)
        index.write(self.out)
        return index

    def _fault(self, sample: Sample) -> str:
        """Say why a sample cannot be used; "" if it can."""
        images = [suffix for suffix in sample.members if suffix in IMAGE_SUFFIXES]
        if len(images) != 1:
            return f"{len(images)} images ({', '.join(images) or 'none'}), expected one"
        try:
            label = label_of(sample, self.json_label)
            if self.num_classes is not None and label >= self.num_classes:
                return f"class {label}, of {self.num_classes} classes"
            if self.decode:
                decode_image(sample.members[images[0]])
        except ValueError as error:
            return str(error)
        self.largest_label = max(self.largest_label, label)
        return ""


def _table_of(scan: Scan, is_good: list[bool]) -> np.ndarray:
    """Return the table of a scan without the samples that are not good, those behind them moving up."""
    table, good = scan.table(), np.array(is_good, dtype=bool)
    table = table[good[table["sample"]]]
    table["sample"] = (np.cumsum(good) - 1)[table["sample"]]
    return table


def index_shards(
    patterns: Sequence[str],
    out: Path,
    *,
    num_classes: int | None,
    json_label: str | None,
    decode: bool,
    cache: ShardCache,
    report: Callable[[str], None] = print,
) -> tuple[Index, Indexing]:
    """Index the tars that `patterns` stand for into the folder `out`; return the index, and what was left out.

    Raises:
        ValueError: `out` is indexed already, or the patterns stand for nothing.
        DamagedData: a tar is not sound to its last byte.
    """
    refuse_complete(out)
    locations = expand_shards(patterns)
    with atomic_folder(out) as folder:
        work = Indexing(folder, cache, json_label, num_classes, decode)
        for number, location in enumerate(locations, 1):
            entry = work.add(location)
            report(f"{number} of {len(locations)}: {without_query(location)}: {entry.samples} samples")
        return work.finish(patterns), work
