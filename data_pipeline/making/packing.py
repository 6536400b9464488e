"""Pack an image folder into image shards, by any number of processes, each of which may be killed at any time.

A shard is a pure function of the source, the options and its number: shard k of a split holds the readable images among
the files k n to (k + 1) n - 1 of a shuffled list, under their places in that list as keys.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import PIL
from PIL import Image, features

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.hashing import permutation
from data_pipeline.images.decoding import (
    NUM_THREADS,
    SUFFIXES,
    DecodingBudget,
    map_in_threads,
    read_header,
    scaled_size,
)
from data_pipeline.loading.plan import Stream
from data_pipeline.making.claims import Claims, Entry, first_difference, forget_finished_work, shard_of
from data_pipeline.making.pack_report import SplitCount, printable
from data_pipeline.making.progress import Progress
from data_pipeline.making.sources import ALL, SPLITS, ImageFile, ImageSource, open_source
from data_pipeline.shards.index import Index, ShardEntry, is_complete, shard_name
from data_pipeline.shards.members import Sample
from data_pipeline.shards.writer import write_shard

REPORT_NAME = "report.json"
FILES_NAME, SKIPPED_NAME = "files.jsonl", "skipped.jsonl"
JPEG_QUALITY = 95
MAX_UNUSED = 1000  # names in the report

_Outcome = tuple[str, bytes, int, int] | str  # suffix, content, width and height of an image, or what is wrong


@dataclass(frozen=True)
class PackReport:
    """The indexes of both splits, and the content of report.json. What was left out is named in skipped.jsonl."""

    train: Index
    val: Index
    counts: dict[str, Any]


def is_packed(out: Path) -> bool:
    """Tell whether pack_images finished in this folder."""
    return all(is_complete(Path(out) / split) for split in SPLITS)


def refuse_packed_otherwise(out: Path, options: dict[str, Any]) -> None:
    """Raise ValueError if a packed folder is not what these options make; the first that differs is named."""
    for meta in (Index.read(out / split, kind="images").meta for split in SPLITS):
        found = {**meta, "labels": meta["classes"] != [ALL]}
        if change := first_difference(found, options):
            raise ValueError(f"{out}: already packed with {change}; delete it or choose another output folder")


def pack_images(
    source: str,
    out: Path,
    *,
    samples_per_shard: int,
    seed: int,
    val_fraction: float,
    resize_short_side: int | None,
    digits_side: int = 16,
    labels: bool = True,
    report: Callable[[str], None] = print,
) -> PackReport:
    """Pack an image folder, or "digits", into `out`/train and `out`/val, shuffled by `seed`.

    Without `labels` the folders are no classes. `val_fraction` counts unless the source has its own train/ and val/.
    Images whose short side is longer than `resize_short_side` are scaled down and stored as JPEG; the others keep their
    bytes, and with None all do. Every image is decoded once: a bad one is left out, counted, and named in
    skipped.jsonl. Other processes may do the same at the same time, have begun it, or have done it.

    Raises FileNotFoundError without a source; ValueError if it holds no class folders or no readable images, or `out`
    is packed with other options, or being packed; SourceChanged if a file changes meanwhile.
    """
    out = Path(out)
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, expected at least 1")
    if resize_short_side is not None and resize_short_side < 1:
        raise ValueError(f"resize_short_side is {resize_short_side}, expected at least 1 pixel, or null for no scaling")
    images = open_source(source, val_fraction=val_fraction, seed=seed, digits_side=digits_side, labels=labels)
    options = {
        "source": source,
        "seed": seed,
        "classes": list(images.classes),
        "encoding": encoding(resize_short_side),
        "val_fraction": val_fraction,
        "samples_per_shard": samples_per_shard,
        "listing": images.listing(),
    }
    if is_packed(out):
        forget_finished_work(out)
        return _read_report(out, options)
    for split in SPLITS:
        if not images.splits[split]:
            raise ValueError(f"{source}: no images for {split}; add images, or raise val_fraction")
    _Packing(images, out, options, resize_short_side, report).run()
    return _read_report(out, options)


def encoding(resize_to: int | None) -> str:
    """Say, for an index, in which form its images are stored. resize_to: pixels of a short side; None: as found."""
    if resize_to is None:
        return "original files"
    return f"original files, those with a short side over {resize_to} pixels scaled down, JPEG quality {JPEG_QUALITY}"


class _Packing:
    """The packing of both splits by this process, beside others."""

    def __init__(
        self,
        source: ImageSource,
        out: Path,
        options: dict[str, Any],
        resize_to: int | None,
        report: Callable[[str], None],
    ) -> None:
        """options: what the indexes' meta says of the packing."""
        self.source = source
        self.out = out
        self.options = options
        self.resize_to = resize_to
        self.report = report
        self.budget = DecodingBudget()
        self.orders = {
            split: permutation(len(source.splits[split]), options["seed"], Stream.PACKING, number)
            for number, split in enumerate(SPLITS)
        }
        size = options["samples_per_shard"]
        self.chunks = {  # shard -> the places of its files in the shuffled list of its split
            f"{split}/{shard_name(number).removesuffix('.tar')}": range(start, min(start + size, len(order)))
            for split, order in self.orders.items()
            for number, start in enumerate(range(0, len(order), size))
        }
        encoder = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"  # makes the JPEG bytes
        plan = options if resize_to is None else {**options, "encoder": encoder}
        self.claims = Claims(out, tuple(self.chunks), plan=plan, is_finished=lambda: is_packed(out), report=report)

    def run(self) -> None:
        """Pack until both splits are finished, by this process or others."""
        self.claims.open()
        sizes = {name: len(places) for name, places in self.chunks.items()}
        self.progress = Progress(self.claims, sizes, report=self.report)
        self.claims.finish(self._pack_shard, self._merge)
        self.report(f"{self.out}: {self.progress.summary()}")

    def _pack_shard(self, name: str) -> Entry:
        """Write one shard; return what is in it, and what is not."""
        count = SplitCount()
        kept: list[dict[str, Any]] = []
        skipped: list[dict[str, Any]] = []
        samples = self._samples(name, count, kept, skipped)
        first = next(samples, None)
        shard = None if first is None else write_shard(chain([first], samples), self.out / f"{name}.tar").to_json()
        return {"shard": shard, "count": vars(count), "files": kept, "skipped": skipped}

    def _samples(
        self, name: str, count: SplitCount, kept: list[dict[str, Any]], skipped: list[dict[str, Any]]
    ) -> Iterator[Sample]:
        """Give the readable files of a shard. Keys are numbers: WebDataset cuts file names at their first dot."""
        split = name.split("/")[0]
        places = self.chunks[name]
        files = [self.source.splits[split][i] for i in self.orders[split][places.start : places.stop]]
        loaded = zip(places, files, map_in_threads(self._load, files, ahead=NUM_THREADS), strict=True)
        for place, file, outcome in self.progress.counted(loaded, lambda one: one[1].num_bytes):
            if isinstance(outcome, str):
                count.add_skipped(outcome)
                skipped.append({"file": file.name, "reason": outcome})
            else:
                suffix, data, width, height = outcome
                count.add_image(file.label, width, height, len(data))
                key = f"{place:09d}"
                kept.append({"key": key, "file": file.name, "label": file.label})
                yield Sample(key, {"cls": str(file.label).encode(), suffix: data})

    def _load(self, file: ImageFile) -> _Outcome:
        """Read and decode one file. An unreadable one is an outcome here, to be counted, not an exception."""
        try:
            return self._stored_image(self.source.read(file))
        except ValueError as error:
            return str(error)

    def _stored_image(self, data: bytes) -> tuple[str, bytes, int, int]:
        stored = read_header(data)
        with self.budget.decoded(stored) as image:
            if self.resize_to is None or min(image.size) <= self.resize_to:
                return SUFFIXES[stored.format], data, *stored.upright_size
            image = image.resize(scaled_size(image, self.resize_to), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
            return "jpg", buffer.getvalue(), *image.size

    def _merge(self) -> None:
        """Make the lists, the report and last the indexes of all entries: the same bytes whoever does it."""
        indexes, splits = {}, {}
        for split in SPLITS:
            shards, count, first_skipped = self._merge_lists(split)
            listed = len(self.source.splits[split])
            assert count.images + count.skipped == listed, f"{split}: {count.images} + {count.skipped} of {listed}"
            if not shards:
                name, reason = first_skipped
                raise ValueError(
                    f"{self.source.name}: no readable images for {split}, the first: {printable(name)}: {reason}"
                )
            meta = {**self.options, "split": split, "skipped": count.skipped}
            indexes[split] = Index("images", tuple(shards), meta)
            num_bytes = sum(shard.bytes for shard in shards)
            totals = {"listed": listed, "shards": len(shards), "bytes": num_bytes}
            splits[split] = totals | count.summary(self.options["classes"]) | {"first_skipped": first_skipped}
        source = self.source
        unused = {"unused": source.unused[:MAX_UNUSED], "num_unused": len(source.unused)}
        unused["num_hidden"] = source.num_hidden
        with atomic_file(self.out / REPORT_NAME) as file:
            file.write(json.dumps({"splits": splits, **unused}, indent=1).encode() + b"\n")
        for split, index in indexes.items():
            index.write(self.out / split)

    def _merge_lists(self, split: str) -> tuple[list[ShardEntry], SplitCount, tuple[str, ...]]:
        """Write files.jsonl and skipped.jsonl, with one entry in memory at a time.

        Return the shards of the split, the count of its images, and name and reason of the first file left out.
        """
        shards, count, first_skipped = [], SplitCount(), ()
        folder = self.out / split
        with atomic_file(folder / FILES_NAME) as files, atomic_file(folder / SKIPPED_NAME) as skipped:
            for name in (name for name in self.chunks if name.startswith(f"{split}/")):
                entry = self.claims.entry(name)
                _write_lines(files, entry["files"])
                _write_lines(skipped, entry["skipped"])
                count.add_json(entry["count"])
                if (shard := shard_of(entry)) is not None:
                    shards.append(shard)
                if entry["skipped"] and not first_skipped:
                    first_skipped = (entry["skipped"][0]["file"], entry["skipped"][0]["reason"])
        return shards, count, first_skipped


def _read_report(out: Path, options: dict[str, Any]) -> PackReport:
    """Read what was packed. Raises ValueError if it is not what these options make."""
    refuse_packed_otherwise(out, options)
    indexes = {split: Index.read(out / split, kind="images") for split in SPLITS}
    return PackReport(**indexes, counts=json.loads((out / REPORT_NAME).read_bytes()))


def _write_lines(file: BinaryIO, rows: list[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
