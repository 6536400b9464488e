"""Images: safe decoding, and the views a model is shown.

Views follow the public VAR code: short side to 1.125 x the image size with LANCZOS, then a random crop (training) or
the centre crop (evaluation), no flip unless asked for. Legend: S image size in pixels.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from data_pipeline.images.headers import StoredImage, read_header
from data_pipeline.images.tensors import floats_of, pixels_of
from data_pipeline.shards.writer import Sample

NUM_THREADS = min(16, os.cpu_count() or 1)  # that decode
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name -> member suffix
IMAGE_SUFFIXES = (*FORMATS.values(), "jpeg")  # the last is only in tars of other people
# Named one by one: Image.open would guess among dozens of formats, and hand a JPEG to the reader of another
DECODERS = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile}
MAX_DECODING_BYTES = 240 * 2**20  # at the peak of decoding one image, the copy of its file included
MAX_PIXELS = 64_000_000  # of a decoded image, whatever it takes
SCALABLE_PIXELS = 200 * 2**20  # of a JPEG that is decoded at a half, a quarter or an eighth of its size
TURNS = {  # EXIF's orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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

    def random_crop(self, image: Image.Image, uniforms: np.ndarray) -> Image.Image:
        """One random view (S, S), chosen by three numbers in [0, 1): top, left, flip."""
        image = resize_short_side(image, self.short_side)
        top = int(uniforms[0] * (image.height - self.image_size + 1))
        left = int(uniforms[1] * (image.width - self.image_size + 1))
        view = self._crop(image, top=top, left=left)
        return ImageOps.mirror(view) if self.flip and uniforms[2] < 0.5 else view

    def center_crop(self, image: Image.Image) -> Image.Image:
        """The view (S, S) in the centre."""
        image = resize_short_side(image, self.short_side)
        top = round((image.height - self.image_size) / 2)
        left = round((image.width - self.image_size) / 2)
        return self._crop(image, top=top, left=left)

    def random_view(self, image: Image.Image, uniforms: np.ndarray) -> Tensor:
        """`random_crop` as a tensor. -> (3, S, S) float32 in [-1, 1]."""
        return floats_of(pixels_of(self.random_crop(image, uniforms)))

    def center_view(self, image: Image.Image) -> Tensor:
        """`center_crop` as a tensor. -> (3, S, S) float32 in [-1, 1]."""
        return floats_of(pixels_of(self.center_crop(image)))

    def _crop(self, image: Image.Image, *, top: int, left: int) -> Image.Image:
        return image.crop((left, top, left + self.image_size, top + self.image_size))


def resize_short_side(image: Image.Image, short_side: int) -> Image.Image:
    """Scale so that the shorter side has `short_side` pixels, keeping the proportions.

    Raises ValueError for a stripe that would become larger than any image that is decoded.
    """
    shorter = min(image.size)
    if shorter == short_side:
        return image
    width, height = (int(short_side * side / shorter) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels: too narrow, it would become {width} x {height}")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a JPEG, PNG or WEBP into RGB, upright by its EXIF orientation; colours under transparency are kept.

    Sizes are read from the header before a pixel is decoded, and decoding takes at most MAX_DECODING_BYTES. A camera's
    JPEG that would take more, of up to SCALABLE_PIXELS, comes at a half, a quarter or an eighth of its size.
    Raises ValueError with a reason for anything else, or anything bad.
    """
    file = read_header(data)
    return _decode(file, _scale(file, max_pixels))


def _scale(file: StoredImage, max_pixels: int) -> int:
    """By how much the image must be scaled down; ValueError if it cannot be by enough."""
    size = f"{file.width} x {file.height} pixels"
    if file.is_scalable and file.num_pixels() > SCALABLE_PIXELS:
        raise ValueError(f"{size}, at most {SCALABLE_PIXELS} are accepted; scale it down")
    for scale in (1, 2, 4, 8) if file.is_scalable else (1,):
        if file.num_pixels(scale) <= max_pixels and file.memory(scale) <= MAX_DECODING_BYTES:
            return scale
    if file.num_pixels() > max_pixels:
        raise ValueError(f"{size}, at most {max_pixels} are accepted; scale it down")
    needed, accepted = -(-file.memory() // 2**20), MAX_DECODING_BYTES // 2**20
    raise ValueError(f"{size} take {needed} MiB to decode, at most {accepted} are accepted; scale it down")


def _decode(file: StoredImage, scale: int) -> Image.Image:
    try:
        image = DECODERS[file.format](io.BytesIO(file.pixels))
        if image.size != (file.width, file.height):
            raise ValueError(f"its headers disagree whether it has {file.width} x {file.height} pixels")
        if scale > 1:
            image.draft(None, (max(1, file.width // scale), max(1, file.height // scale)))
            if image.width * image.height > file.num_pixels(scale):
                raise ValueError(f"{file.width} x {file.height} pixels cannot be scaled down while decoding")
        image.load()
        if file.format == "WEBP":
            image = image.copy()  # the decoder holds two pictures, as long as its own is there
        if file.orientation != 1:
            image = image.transpose(TURNS[file.orientation])
        if image.mode.startswith("I"):  # 16-bit grey: keep the high byte; Pillow's own conversion would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")
    except _decoding_errors() as error:
        raise ValueError(f"damaged {file.format}: {error or type(error).__name__}") from error


def _decoding_errors() -> tuple[type[Exception], ...]:
    # Pillow promises no complete list; these are what its JPEG, PNG and WEBP readers raise on damaged input.
    lookups = (IndexError, KeyError, TypeError, OverflowError, EOFError)
    return (OSError, ValueError, SyntaxError, struct.error, zlib.error, *lookups)


class DecodingBudget:
    """Lets several threads of a process decode at once, as long as all their images together stay within the memory.

    num_bytes: for all that are being decoded or in use; one image alone may always take MAX_DECODING_BYTES.
    """

    def __init__(self, num_bytes: int = MAX_DECODING_BYTES) -> None:
        self._left = max(num_bytes, MAX_DECODING_BYTES)
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # who waits for a large image is not overtaken for ever by small ones

    @contextmanager
    def decoded(self, data: bytes) -> Iterator[Image.Image]:
        """An image as `decode_image` gives it; its memory is free for others when the block ends."""
        file = read_header(data)
        scale = _scale(file, MAX_PIXELS)
        needed = file.memory(scale)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._left >= needed)
            self._left -= needed
        try:
            yield _decode(file, scale)
        finally:
            with self._changed:
                self._left += needed
                self._changed.notify_all()


def encoded_image(sample: Sample) -> bytes:
    """The file of an image sample. Raises ValueError if there is none."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.members:
            return sample.members[suffix]
    raise ValueError(f"no image among the members {sorted(sample.members)}, expected one of {list(IMAGE_SUFFIXES)}")


def image_of(sample: Sample) -> Image.Image:
    """The decoded image of an image sample. Raises ValueError if there is none, or it is damaged."""
    return decode_image(encoded_image(sample))


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[Result]:
    """Like map, in order, over threads that work ahead while results are in use. Pillow decodes in parallel.

    ahead: how many results may wait or be in work.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # of what nobody will ask for
            pool.shutdown(wait=False, cancel_futures=True)
