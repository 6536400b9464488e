"""Image files to RGB pixels, the crops that a model is shown, and the class that is stored beside an image.

Pillow decodes. What it leaves to its callers is done here, so that one bad file costs at most MAX_DECODING_BYTES: the
size is checked before a pixel is decoded, chunks of a PNG that are no pixels are dropped before Pillow allocates for
them, and of EXIF the orientation alone is read, since Pillow copies the value of every tag. Only a JPEG of nothing but
comments costs more, 18 times its own size. Legend: S image size.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data_pipeline.shards.members import Sample

NUM_THREADS = min(16, os.cpu_count() or 1)  # that decode
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name of a format -> suffix of the member
IMAGE_SUFFIXES = (*SUFFIXES.values(), "jpeg")  # the last is found only in tars of other people

MAX_DECODING_BYTES = 512 * 2**20  # at the peak of decoding one image, a copy of its file included
MAX_PIXELS = 64_000_000  # of a decoded image
MAX_SCALABLE_PIXELS = 200 * 2**20  # of a JPEG that is decoded at a half, a quarter or an eighth of its size
BYTES_PER_PIXEL = {  # at the peak of decoding; Pillow keeps a pixel of RGB, RGBA or CMYK in four bytes
    "JPEG": 8,  # the image before and after it is turned, or made RGB
    "PNG": 8,
    "WEBP": 16,  # two canvases of libwebp, and the image before and after it is turned
}
MAX_SIDE = 65_535  # pixels; what a JPEG can have
MAX_SCANS = 100  # of a progressive JPEG, each of which goes over the whole picture; encoders make about 10
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")  # of a PNG
PNG_HEADER = 33  # bytes: the signature and IHDR
ORIENTATION, SHORT, LONG = 0x0112, 3, 4  # the tag of EXIF, and the types in which it is written
UPRIGHT = 1
TURNS = {  # orientation by EXIF -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow promises no complete list; its JPEG, PNG and WEBP readers raise these on damaged input.
DECODING_ERRORS = (
    *(OSError, ValueError, SyntaxError, struct.error, zlib.error),
    *(IndexError, KeyError, TypeError, OverflowError, EOFError),
)

MAX_LABEL = 2**16 - 1  # what a record of codes has room for
MAX_JSON_BYTES = 2**20
JSON_KEY = "label"  # under which the class stands in a json member, unless another is named

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ImageTransform:
    """The way from a decoded image to a crop (S, S): scale the short side to resize_ratio x S, crop, perhaps flip.

    The public VAR code (utils/data.py) scales to 1.125 x S with LANCZOS, takes a random crop in training and the
    centre crop in evaluation, and flips only if asked. With resize_ratio 1, images of the size S stay untouched.
    """

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
        """The length in pixels of the shorter side that is cropped from."""
        return round(self.image_size * self.resize_ratio)

    def random_crop(self, image: Image.Image, uniforms: np.ndarray) -> Image.Image:
        """Cut out the crop (S, S) that three numbers in [0, 1) choose: its top, its left, and whether it is flipped."""
        width, height = scaled_size(image, self.short_side)
        top = int(uniforms[0] * (height - self.image_size + 1))
        left = int(uniforms[1] * (width - self.image_size + 1))
        crop = self._crop(image, (width, height), top=top, left=left)
        return ImageOps.mirror(crop) if self.flip and uniforms[2] < 0.5 else crop

    def center_crop(self, image: Image.Image) -> Image.Image:
        """Cut out the crop (S, S) in the centre; half pixels are rounded to even, as torchvision's CenterCrop does."""
        width, height = scaled_size(image, self.short_side)
        top = round((height - self.image_size) / 2)
        left = round((width - self.image_size) / 2)
        return self._crop(image, (width, height), top=top, left=left)

    def _crop(self, image: Image.Image, scaled: tuple[int, int], *, top: int, left: int) -> Image.Image:
        """Crop the image as it is when scaled to this size; of a stripe, which would fill the memory, scale a part."""
        size, box = self.image_size, (left, top, left + self.image_size, top + self.image_size)
        if scaled[0] * scaled[1] <= MAX_PIXELS:
            return (image if image.size == scaled else image.resize(scaled, Image.Resampling.LANCZOS)).crop(box)
        x, y = image.width / scaled[0], image.height / scaled[1]
        part = (box[0] * x, box[1] * y, min(box[2] * x, image.width), min(box[3] * y, image.height))
        return image.resize((size, size), Image.Resampling.LANCZOS, box=part)


def scaled_size(image: Image.Image, short_side: int) -> tuple[int, int]:
    """Return the width and height of an image whose shorter side is scaled to `short_side` pixels."""
    shorter = min(image.size)
    return int(short_side * image.width / shorter), int(short_side * image.height / shorter)


@dataclass(frozen=True)
class StoredImage:
    """An image file whose header has been read, and no pixel yet.

    format: "JPEG", "PNG" or "WEBP". width, height: pixels, as stored. orientation: by EXIF; 1 is upright.
    scale: 1, or 2, 4 or 8 for a camera's JPEG that is too large to be decoded at its full size.
    num_bytes: the memory that decoding takes at its peak.
    """

    format: str
    width: int
    height: int
    orientation: int
    scale: int
    num_bytes: int
    _data: bytes

    @property
    def upright_size(self) -> tuple[int, int]:
        """The width and height in pixels of the stored image when it is shown upright."""
        return (self.width, self.height) if self.orientation < 5 else (self.height, self.width)

    def decode(self) -> Image.Image:
        """Decode the pixels into RGB, upright, the colours under transparency kept. Raises ValueError for damage."""
        try:
            image: Image.Image = READERS[self.format](io.BytesIO(self._data))
            if self.scale > 1:
                image.draft(None, (max(1, self.width // self.scale), max(1, self.height // self.scale)))
            image.load()
            if self.orientation != UPRIGHT:
                image = image.transpose(TURNS[self.orientation])
            if image.mode.startswith("I"):  # 16-bit grey: keep the high byte; Pillow's conversion would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
        except DECODING_ERRORS as error:
            raise _damaged(self.format, error) from error


def read_header(data: bytes) -> StoredImage:
    """Read the header of a JPEG, PNG or WEBP file.

    Raises ValueError with a reason if it is none, is damaged, or takes more than MAX_DECODING_BYTES. A JPEG that the
    decoder reads line by line, as cameras write them, is accepted up to MAX_SCALABLE_PIXELS, and scaled down.
    """
    kind = _format_of(data)
    pixels = _pixel_chunks(data) if kind == "PNG" else data
    stream = io.BytesIO(pixels)
    try:
        file = READERS[kind](stream)
    except DECODING_ERRORS as error:
        raise _damaged(kind, error) from error
    bytes_per_pixel, is_scalable = BYTES_PER_PIXEL[kind], False
    if isinstance(file, JpegImageFile):
        is_scalable = _is_read_by_lines(file, data, stream.tell())
        if not is_scalable:
            bytes_per_pixel = 4 + 2 * file.layers  # the image, and two bytes for each coefficient
    width, height = file.size
    most = MAX_SCALABLE_PIXELS if is_scalable else MAX_PIXELS
    if max(width, height) > MAX_SIDE or width * height > most:
        raise ValueError(f"{width} x {height} pixels, accepted are {most} and {MAX_SIDE} a side; scale it down")
    orientation = exif_orientation(file.info.get("exif", b""))
    for scale in (1, 2, 4, 8) if is_scalable else (1,):
        num_pixels = -(-width // scale) * -(-height // scale)
        num_bytes = num_pixels * bytes_per_pixel + len(pixels)
        if num_pixels <= MAX_PIXELS and num_bytes <= MAX_DECODING_BYTES:
            return StoredImage(kind, width, height, orientation, scale, num_bytes, pixels)
    needed, most = -(-num_bytes // 2**20), MAX_DECODING_BYTES // 2**20
    raise ValueError(f"{width} x {height} pixels take {needed} MiB to decode, accepted are {most}; scale it down")


def decode_image(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WEBP file into RGB, as `read_header` and `StoredImage.decode` say, and raise."""
    return read_header(data).decode()


class _Jpeg(JpegImageFile):
    """A JPEG whose EXIF stays unread: Pillow reads all of it on opening, for the resolution."""

    def getexif(self) -> Image.Exif:
        return Image.Exif()


# Named one by one: Image.open would try dozens of formats, and hand a JPEG to the reader of another.
READERS: dict[str, type[ImageFile]] = {"JPEG": _Jpeg, "PNG": PngImageFile, "WEBP": WebPImageFile}


def _format_of(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise ValueError("not a JPEG, PNG or WEBP image")


def _pixel_chunks(png: bytes) -> bytes:
    """Drop what is no pixel: Pillow inflates texts and profiles, and fills a canvas for frames, before it is asked."""
    kept, place = bytearray(png[:8]), 8
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        end = place + 12 + length  # behind the checksum
        if kind in PIXEL_CHUNKS:
            kept += png[place:end]
        elif kind == b"eXIf":
            kept[PNG_HEADER:PNG_HEADER] = png[place:end]  # in front of the pixels, if it is not there already
        place = end
    return bytes(kept)


def _is_read_by_lines(file: JpegImageFile, data: bytes, scan: int) -> bool:
    """Tell whether one scan holds all colours of a JPEG; the decoder keeps the coefficients of any other in memory.

    scan: where the data of the first scan begin. Raises ValueError for a file that is too short for its size, whose
    missing part the decoder would fill with grey, and for one of endless scans, which would take hours.
    """
    components_of_scan = data[data.rfind(b"\xff\xda", 0, scan) + 4]
    is_read_by_lines = not file.info.get("progressive") and components_of_scan == file.layers
    bits, bits_per_block = 8 * (len(data) - scan), 2 if is_read_by_lines else 1
    if bits * 64 < file.width * file.height * bits_per_block:
        raise ValueError(f"cut short: {len(data)} bytes cannot hold {file.width} x {file.height} pixels")
    if not is_read_by_lines and data.count(b"\xff\xda", scan) >= MAX_SCANS:
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans; write it anew")
    return is_read_by_lines


def exif_orientation(exif: bytes) -> int:
    """Read the orientation, 1 to 8, from EXIF data; 1, upright, where they do not say, or cannot be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return UPRIGHT
    try:
        (first,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, first)
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
            if tag == ORIENTATION and kind in (SHORT, LONG):
                (value,) = struct.unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", tiff, place + 8)
                return value if value in TURNS else UPRIGHT
    except struct.error:
        pass
    return UPRIGHT


def _damaged(kind: str, error: Exception) -> ValueError:
    return ValueError(f"damaged {kind}: {error or type(error).__name__}")


class DecodingBudget:
    """The memory that several threads of a process may decode in at once: as much as one image may take."""

    def __init__(self) -> None:
        self._left = MAX_DECODING_BYTES
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # who waits for a large image is not overtaken for ever by small ones

    @contextmanager
    def decoded(self, stored: StoredImage) -> Iterator[Image.Image]:
        """Decode an image when there is memory for it, which is free for others when the block ends."""
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._left >= stored.num_bytes)
            self._left -= stored.num_bytes
        try:
            yield stored.decode()
        finally:
            with self._changed:
                self._left += stored.num_bytes
                self._changed.notify_all()


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[Result]:
    """Map a function over items, in order, in threads that work ahead while results are in use.

    Pillow decodes in parallel. ahead: how many results may wait or be in work, which the pool's own map does not bound.
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
        finally:  # after an error, nobody asks for the rest
            pool.shutdown(wait=False, cancel_futures=True)


def encoded_image(sample: Sample) -> bytes:
    """The image file of a sample. Raises ValueError if there is none."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.members:
            return sample.members[suffix]
    raise ValueError(f"no image among the members {sorted(sample.members)}, expected one of {list(IMAGE_SUFFIXES)}")


def image_of(sample: Sample) -> Image.Image:
    """Decode the image of a sample. Raises ValueError if there is none, or it is damaged."""
    return decode_image(encoded_image(sample))


def label_of(sample: Sample, json_key: str | None = JSON_KEY) -> int:
    """The class of a sample: the number in its cls member, or without one, what its json member has under `json_key`.

    json_key: None for pictures without classes, which are all of class 0.

    Of the json member only that field has to be sound. A text of digits and a float that is a whole number are taken.
    Raises ValueError if that is no number from 0 to MAX_LABEL.
    """
    if json_key is None:
        return 0
    if "cls" in sample.members:
        where, value = "cls is", sample.members["cls"].decode("ascii", "backslashreplace")
    elif "json" in sample.members:
        where, value = f"json has as {json_key}", _json_field(sample.members["json"], json_key)
    else:
        raise ValueError(f"no label among the members {sorted(sample.members)}, expected cls or json")
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,20}\s*", value):
        number: Any = int(value)
    else:
        number = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(number) is not int or not 0 <= number <= MAX_LABEL:
        raise ValueError(f"member {where} {repr(value)[:40]}, expected a class number from 0 to {MAX_LABEL}")
    return number


def _json_field(content: bytes, key: str) -> Any:
    """Read one field of an object. What the others hold is no matter: NaN, endless numbers, texts in another code."""
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"member json has {len(content)} bytes, at most {MAX_JSON_BYTES} are accepted")
    try:
        # Pairs, so that a field given twice shows; float, which takes as many digits as there are.
        text = content.decode("utf-8-sig", "replace")
        fields = json.loads(
            text, object_pairs_hook=tuple, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits)
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"member json is not valid JSON ({error})") from None
    found = [value for name, value in fields if name == key] if isinstance(fields, tuple) else []
    if len(found) != 1:
        raise ValueError(
            f"member json has {len(found) or 'no'} fields {key}, expected one class number; see json_label"
        )
    return found[0]
