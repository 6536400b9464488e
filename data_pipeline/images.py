"""Images: safe decoding, the views a model is shown, and the way from an image folder to image shards.

Views follow the public VAR code: short side to 1.125 x the image size with LANCZOS, then a random crop (training) or
the centre crop (evaluation), no flip unless asked for. Legend: S image size in pixels.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.files import atomic_file
from data_pipeline.index import INDEX_NAME, Index, is_complete
from data_pipeline.plan import Stream, permutation
from data_pipeline.shards import Sample, write_tars
from data_pipeline.sources import SPLITS, ImageFile, ImageSource, open_source

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member suffix

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageTransform:
    """From a decoded image to what the model sees. With resize_ratio 1, images already of the size stay untouched."""

    image_size: int
    resize_ratio: float = 1.125
    flip: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}, expected at least 1 pixel")
        if not self.resize_ratio >= 1.0:
            raise ValueError(f"resize_ratio is {self.resize_ratio}, expected at least 1, or the crop would not fit")

    @property
    def short_side(self) -> int:
        return round(self.image_size * self.resize_ratio)

    def random_view(self, image: Image.Image, uniforms: np.ndarray) -> Tensor:
        """One random crop, chosen by three numbers in [0, 1): top, left, flip. -> (3, S, S) float32 in [-1, 1]."""
        image = resize_short_side(image, self.short_side)
        top = int(uniforms[0] * (image.height - self.image_size + 1))
        left = int(uniforms[1] * (image.width - self.image_size + 1))
        view = self._crop(image, top=top, left=left)
        if self.flip and uniforms[2] < 0.5:
            view = ImageOps.mirror(view)
        return _to_tensor(view)

    def center_view(self, image: Image.Image) -> Tensor:
        """The centre crop. -> (3, S, S) float32 in [-1, 1]."""
        image = resize_short_side(image, self.short_side)
        top = round((image.height - self.image_size) / 2)
        left = round((image.width - self.image_size) / 2)
        return _to_tensor(self._crop(image, top=top, left=left))

    def _crop(self, image: Image.Image, *, top: int, left: int) -> Image.Image:
        return image.crop((left, top, left + self.image_size, top + self.image_size))


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Scale so that the shorter side has `short_side` pixels, keeping the proportions."""
    shorter = min(image.size)
    if shorter == short_side:
        return image
    width, height = (int(short_side * side / shorter) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image))  # (S, S, 3) uint8
    return pixels.permute(2, 0, 1).to(torch.float32).div_(255).mul_(2).sub_(1).contiguous()


def decode_image(data: bytes, *, max_pixels: int = 64_000_000) -> Image.Image:
    """Decode a JPEG, PNG or WEBP into RGB, upright by its EXIF orientation.

    The size in the header is checked before any pixel is decoded. Raises ValueError for anything else, or anything bad.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            num_pixels = image.width * image.height
            if num_pixels > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {max_pixels} are accepted")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a JPEG, PNG or WEBP image") from error
    except _decoding_errors() as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _decoding_errors() -> tuple[type[Exception], ...]:
    # Pillow promises no complete list; these are what its JPEG, PNG, WEBP and EXIF readers raise on damaged input.
    lookups = (IndexError, KeyError, TypeError, OverflowError, EOFError)
    return (OSError, ValueError, SyntaxError, struct.error, zlib.error, Image.DecompressionBombError, *lookups)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte; Pillow's own conversion would clip to white
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def image_of(sample: Sample) -> Image.Image:
    """The decoded image of an image sample. Raises ValueError if there is none, or it is damaged."""
    for suffix in FORMATS.values():
        if suffix in sample.members:
            return decode_image(sample.members[suffix])
    raise ValueError(f"no image among the members {sorted(sample.members)}, expected one of {list(FORMATS.values())}")


def label_of(sample: Sample) -> int:
    """The class of an image sample. Raises ValueError if its cls member is not a number."""
    text = sample.members.get("cls", b"")
    if not text.isdigit() or len(text) > 9:
        raise ValueError(f"member cls is {text[:20]!r}, expected a class number")
    return int(text)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], *, at_once: int) -> Iterator[Result]:
    """Like map, in order, over threads, with at most `at_once` results in memory. Pillow decodes in parallel."""
    stream = iter(items)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(stream, at_once)):
            yield from pool.map(function, chunk)


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
