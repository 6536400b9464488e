"""From an image folder to image shards."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.files import atomic_file
from data_pipeline.images import FORMATS, decode_image, map_in_threads, resize_short_side
from data_pipeline.index import INDEX_NAME, Index, is_complete
from data_pipeline.plan import Stream, permutation
from data_pipeline.shards import Sample, write_tars
from data_pipeline.sources import SPLITS, ImageFile, ImageSource, open_source


@dataclass(frozen=True)
class PackReport:
    """What pack_images did. `skipped` names every file that was left out, with the reason."""

    train: Index
    val: Index
    skipped: list[tuple[str, str]]


def is_packed(out: Path) -> bool:
    """True if pack_images finished in this folder."""
    return all(is_complete(Path(out) / split) for split in SPLITS)


def pack_images(
    source: str,
    out: Path,
    *,
    samples_per_shard: int,
    seed: int,
    val_fraction: float,
    resize_short_side: int | None,
    digits_side: int = 16,
    report: Callable[[str], None] = print,
) -> PackReport:
    """Pack an image folder, or "digits", into `out`/train and `out`/val, shuffled by `seed`.

    `val_fraction` counts unless the source has its own train/ and val/. With `resize_short_side`, larger images are
    scaled down and all are stored as JPEG; without, files keep their bytes. Every image is decoded once: a bad one is
    left out, counted, and named in skipped.jsonl.
    Raises FileNotFoundError without a source, ValueError if it holds no class folders or no readable images, or `out`
    is already packed.
    """
    out = Path(out)
    if is_packed(out):
        raise ValueError(f"{out}: already packed; delete it or choose another output folder")
    images = open_source(source, val_fraction=val_fraction, seed=seed, digits_side=digits_side)
    packings = {split: _Packing(images, split, resize_to=resize_short_side) for split in SPLITS}
    stored = encoding(resize_short_side)
    options = {"source": source, "seed": seed, "classes": list(images.classes), "encoding": stored}
    indexes = {}
    for packing in packings.values():
        indexes[packing.split] = packing.write(out, samples_per_shard=samples_per_shard, seed=seed, options=options)
        report(packing.summary())
    skipped = [failure for packing in packings.values() for failure in packing.skipped]
    return PackReport(indexes["train"], indexes["val"], skipped)


def encoding(resize_to: int | None) -> str:
    """How an index says in which form its images are stored."""
    return "original files" if resize_to is None else f"JPEG quality 95, short side at most {resize_to} pixels"


@dataclass
class _Packing:
    """The work on one split, and what has been found so far."""

    source: ImageSource
    split: str
    resize_to: int | None
    kept: list[ImageFile] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def write(self, out: Path, *, samples_per_shard: int, seed: int, options: dict[str, Any]) -> Index:
        folder = out / self.split
        (folder / INDEX_NAME).unlink(missing_ok=True)  # the other split of an interrupted run: it is packed again
        files = self.source.splits[self.split]
        order = permutation(len(files), seed, Stream.PACKING, SPLITS.index(self.split))
        shards = write_tars(self._samples([files[i] for i in order]), folder, samples_per_shard=samples_per_shard)
        if not self.kept:
            reason = self._first_reason() or "; add images, or raise val_fraction"
            raise ValueError(f"{self.source.name}: no readable images for {self.split}{reason}")
        names = ({"key": _key(i), "file": file.name, "label": file.label} for i, file in enumerate(self.kept))
        _write_lines(folder / "files.jsonl", names)
        _write_lines(folder / "skipped.jsonl", ({"file": name, "reason": reason} for name, reason in self.skipped))
        index = Index("images", shards, {**options, "split": self.split, "skipped": len(self.skipped)})
        index.write(folder)
        return index

    def summary(self) -> str:
        return f"{self.split}: {len(self.kept)} images packed, {len(self.skipped)} skipped{self._first_reason()}"

    def _first_reason(self) -> str:
        return "".join(f", the first: {name}: {reason}" for name, reason in self.skipped[:1])

    def _samples(self, files: Sequence[ImageFile]) -> Iterator[Sample]:
        """Every readable file as a sample. Keys are numbers, because WebDataset cuts file names at their first dot."""
        for file, outcome in zip(files, map_in_threads(self._load, files, at_once=256)):
            if isinstance(outcome, ValueError):
                self.skipped.append((file.name, str(outcome)))
                continue
            self.kept.append(file)
            yield Sample(_key(len(self.kept) - 1), {"cls": str(file.label).encode(), **outcome})

    def _load(self, file: ImageFile) -> dict[str, bytes] | ValueError:
        """The image member of one file. An unreadable image is an outcome here, to be counted, not an exception."""
        try:
            return _image_member(self.source.read(file.name), resize_to=self.resize_to)
        except ValueError as error:
            return error


def _key(number: int) -> str:
    return f"{number:09d}"


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_file(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def _image_member(data: bytes, *, resize_to: int | None) -> dict[str, bytes]:
    image = decode_image(data)
    if resize_to is None:
        return {_suffix(data): data}
    if min(image.size) > resize_to:
        image = resize_short_side(image, resize_to)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return {"jpg": buffer.getvalue()}


def _suffix(data: bytes) -> str:
    # By content: ImageNet has a PNG among its files named .JPEG.
    with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
        return FORMATS.get(image.format, "jpg")  # MPO, the JPEG of some phones, comes under a name of its own
