"""Images: safe decoding, and the views a model is shown.

Views follow the public VAR code: short side to 1.125 x the image size with LANCZOS, then a random crop (training) or
the centre crop (evaluation), no flip unless asked for. Legend: S image size in pixels.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.shards import Sample

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
