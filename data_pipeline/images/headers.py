"""What a JPEG, PNG or WEBP file says before a pixel of it is decoded, and the part of it that holds the pixels.

Size, orientation and the memory that decoding takes are read here, from headers alone. What is not pixels - EXIF, ICC
profiles, XMP, texts, thumbnails, all frames but the first - never reaches the decoder: the parsers of such things are
the ones that small files make fill the memory, and none of them changes a colour here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import mul
from struct import unpack_from
from typing import Literal

NOT_AN_IMAGE = "not a JPEG, PNG or WEBP image"
CUT_SHORT = "cut short: it ends within its header"
MAX_SIDE = 65_535  # pixels; what a JPEG can have
MAX_PARTS = 50_000  # segments or chunks of one file; a PNG of 400 MB in chunks of 8 KiB has as many
MAX_SCANS = 50  # of a progressive JPEG, each of which goes over the whole picture; encoders make about 10
ORIENTATION, SHORT, LONG = 0x0112, 3, 4  # the EXIF tag, and the types in which it is written

RGB_BYTES = 4  # that a pixel takes in Pillow, with or without transparency, and in CMYK
COEFFICIENT_BYTES = 2  # of each sample of a JPEG that is held until its last scan
WEBP_BYTES = 16  # two canvases of libwebp, a copy of one, and the image

APP0, APP1, APP14, START_OF_SCAN, END_OF_IMAGE = 0xE0, 0xE1, 0xEE, 0xDA, 0xD9
ALONE = {0x00, 0x01, 0xFF, *range(0xD0, 0xD9)}  # markers, and bytes that look like one, that nothing belongs to
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), 0xC2
TABLES = {0xC4, 0xDB, 0xDD}
MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
WEBP_CHUNKS = {b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L", b"EXIF"}
TRANSPARENT_OR_MOVING = 0x12  # the flags of VP8X that stay


@dataclass(frozen=True)
class StoredImage:
    """An image as it is stored: not turned upright yet."""

    format: str  # "JPEG", "PNG" or "WEBP"
    width: int
    height: int
    orientation: int  # EXIF's 1 to 8; 1: upright
    bytes_per_pixel: float  # at the peak of decoding, until it is upright RGB
    is_scalable: bool  # whether the decoder can halve it, again and again, without ever holding the whole
    pixels: bytes  # the file without what is not pixels

    def num_pixels(self, scale: int = 1) -> int:
        """Of the image at 1 / scale of its size."""
        return -(-self.width // scale) * -(-self.height // scale)

    def memory(self, scale: int = 1) -> int:
        """Bytes that decoding takes at most, at 1 / scale of the size; a copy of the file is among them."""
        return int(self.num_pixels(scale) * self.bytes_per_pixel) + len(self.pixels)


def read_header(data: bytes) -> StoredImage:
    """Read the headers of an image file. Raises ValueError with a reason if it is none, or makes no sense."""
    reader = _reader_of(data)
    if reader is None:
        raise ValueError(NOT_AN_IMAGE)
    try:
        file = reader(data)
    except (IndexError, struct.error):
        raise ValueError(CUT_SHORT) from None
    if not (1 <= file.width <= MAX_SIDE and 1 <= file.height <= MAX_SIDE):
        raise ValueError(f"{file.width} x {file.height} pixels; each side must have 1 to {MAX_SIDE}")
    return file


def _reader_of(data: bytes) -> Callable[[bytes], StoredImage] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png
    return _read_webp if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


@dataclass
class _Jpeg:
    """What the segments before the first scan say."""

    kept: list[bytes]
    seen: set[int]
    width: int = 0
    height: int = 0
    components: int = 0
    samples_per_pixel: float = 0.0  # of all components: 3 at full resolution, 1.5 if colours have a quarter of it
    is_progressive: bool = False
    orientation: int = 1

    def take(self, marker: int, segment: bytes) -> None:
        """Take in one segment, which begins with its marker and length."""
        if marker in FRAMES:
            self._take_frame(marker, segment)
        elif marker == APP1 and APP1 not in self.seen and segment[4:10] == b"Exif\0\0":
            self.orientation = exif_orientation(segment[10:])
            self.seen.add(APP1)
        if marker in TABLES or marker in FRAMES or (marker in (APP0, APP14) and marker not in self.seen):
            self.kept.append(segment)
            self.seen.add(marker)

    def _take_frame(self, marker: int, segment: bytes) -> None:
        if self.components:
            raise ValueError("a JPEG with two frame headers")
        if marker not in (*SEQUENTIAL, PROGRESSIVE):
            raise ValueError(f"a JPEG of a kind that is not read here (SOF{marker - 0xC0}): lossless or arithmetic")
        bits, self.height, self.width, count = unpack_from(">BHHB", segment, 4)
        if bits != 8 or count not in (1, 3, 4) or len(segment) != 10 + 3 * count:
            raise ValueError(f"a JPEG of {count} components of {bits} bits, read are those of 1, 3 or 4 of 8 bits")
        across, down = ([factor >> 4 for factor in segment[11::3]], [factor & 15 for factor in segment[11::3]])
        if not all(1 <= factor <= 4 for factor in across + down):
            raise ValueError("a JPEG with impossible sampling factors")
        self.components = count
        self.samples_per_pixel = sum(map(mul, across, down)) / (max(across) * max(down))
        self.is_progressive = marker == PROGRESSIVE


def _read_jpeg(data: bytes) -> StoredImage:
    jpeg = _Jpeg([data[:2]], set())
    place = 2
    for _ in range(MAX_PARTS):
        start = data.find(b"\xff", place)  # what stands between segments is passed over, as decoders do
        marker = data[start + 1] if start >= 0 else END_OF_IMAGE
        if marker in ALONE:
            place = start + (1 if marker == 0xFF else 2)
            continue
        if marker == END_OF_IMAGE:
            raise ValueError(CUT_SHORT)
        place = start + 2 + _segment_length(data, start)
        if marker == START_OF_SCAN:
            return _jpeg_file(data, jpeg, start)
        jpeg.take(marker, data[start:place])
    raise ValueError(f"a JPEG of more than {MAX_PARTS} segments")


def _segment_length(data: bytes, start: int) -> int:
    length = unpack_from(">H", data, start + 2)[0]
    if length < 2 or start + 2 + length > len(data):
        raise ValueError(CUT_SHORT)
    return length


def _jpeg_file(data: bytes, jpeg: _Jpeg, first_scan: int) -> StoredImage:
    if not jpeg.components:
        raise ValueError("a JPEG without a frame header")
    is_whole = jpeg.is_progressive or data[first_scan + 4] < jpeg.components  # all of it is held until the last scan
    end = _end_of_scans(data, first_scan) if is_whole else len(data)
    samples = jpeg.samples_per_pixel * jpeg.width * jpeg.height
    if 8 * (end - first_scan) < samples / 64 * (1 if jpeg.is_progressive else 2):  # bits that a block takes at least
        raise ValueError(f"cut short: {end} bytes cannot hold {jpeg.width} x {jpeg.height} pixels")
    coefficients = COEFFICIENT_BYTES * jpeg.samples_per_pixel if is_whole else 0
    while_decoding = coefficients + (1 if jpeg.components == 1 else RGB_BYTES)
    head = b"".join(jpeg.kept)
    return StoredImage(
        "JPEG",
        jpeg.width,
        jpeg.height,
        jpeg.orientation,
        max(while_decoding, _finishing_bytes(jpeg.components, jpeg.orientation)),
        not is_whole,
        data if len(head) == first_scan and end == len(data) else head + data[first_scan:end],
    )


def _end_of_scans(data: bytes, place: int) -> int:
    """Where the picture ends; ValueError if it has so many scans that decoding would take minutes."""
    scans = 0
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, place)
        if found is None:
            return len(data)
        start, marker = found.start(), data[found.start() + 1]
        if marker == END_OF_IMAGE:
            return start + 2
        scans += marker == START_OF_SCAN
        if scans > MAX_SCANS:
            break
        place = start + 2 + _segment_length(data, start)
    raise ValueError(f"a JPEG of more than {MAX_SCANS} scans; write it anew")


def _finishing_bytes(channels: int, orientation: int) -> int:
    """Of a pixel, while it is turned and made RGB: the image before and after."""
    if channels == 1:
        return 1 + RGB_BYTES
    return RGB_BYTES if channels == 3 and orientation == 1 else 2 * RGB_BYTES


def _read_png(data: bytes) -> StoredImage:
    if data[8:16] != b"\0\0\0\rIHDR":
        raise ValueError("a PNG that does not begin with its header")
    width, height, bits, colour = unpack_from(">IIBB", data, 16)
    if colour not in CHANNELS or bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"a PNG of colour type {colour} with {bits} bits, which does not exist")
    kept, orientation = [data[:8]], 1
    for kind, place, end in _chunks(data, 8, "big"):
        if kind in PIXEL_CHUNKS:
            kept.append(data[place:end])
        elif kind == b"eXIf":
            orientation = exif_orientation(data[place + 8 : end - 4])
        if kind == b"IEND":
            break
    is_deep_grey = colour == 0 and bits == 16
    finishing = 2 * RGB_BYTES if is_deep_grey else _finishing_bytes(CHANNELS[colour], orientation)
    pixels = data if sum(map(len, kept)) == len(data) else b"".join(kept)
    return StoredImage("PNG", width, height, orientation, finishing, False, pixels)


def _read_webp(data: bytes) -> StoredImage:
    chunks: dict[bytes, bytes] = {}  # the first of each kind: of an animation the first frame
    for kind, place, end in _chunks(data, 12, "little"):
        if kind in WEBP_CHUNKS:
            chunk = data[place:end]
            chunks.setdefault(kind, chunk + bytes(len(chunk) % 2))
    image = next((chunks[kind] for kind in (b"ANMF", b"VP8 ", b"VP8L") if kind in chunks), None)
    if image is None:
        raise ValueError(CUT_SHORT)
    if canvas := chunks.get(b"VP8X"):
        width, height = (int.from_bytes(canvas[at : at + 3], "little") + 1 for at in (12, 15))
        chunks[b"VP8X"] = canvas[:8] + bytes([canvas[8] & TRANSPARENT_OR_MOVING]) + canvas[9:]
    elif image.startswith(b"VP8L"):
        size = unpack_from("<I", image, 9)[0]
        width, height = (size & 0x3FFF) + 1, (size >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in unpack_from("<HH", image, 14))
    orientation = exif_orientation(chunks.pop(b"EXIF", b"")[8:])
    body = b"WEBP" + b"".join(chunks.values())
    pixels = b"RIFF" + struct.pack("<I", len(body)) + body
    return StoredImage("WEBP", width, height, orientation, WEBP_BYTES, False, pixels)


def _chunks(data: bytes, place: int, order: Literal["big", "little"]) -> Iterator[tuple[bytes, int, int]]:
    """Kind, beginning and end of the chunks of a PNG ("big") or a RIFF; the end of the last may lie beyond the file."""
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            return
        kind, size = data[place : place + 4], data[place + 4 : place + 8]
        if order == "big":
            kind, size = size, kind
        length = int.from_bytes(size, order)
        end = place + 8 + length + (4 if order == "big" else length % 2)  # a checksum, or what makes it even
        yield kind, place, end
        place = end
    raise ValueError(f"more than {MAX_PARTS} chunks")


def exif_orientation(exif: bytes) -> int:
    """1 to 8 as the EXIF data say; 1, upright, where they do not, or cannot be read."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        first = unpack_from(f"{order}I", tiff, 4)[0]
        count = unpack_from(f"{order}H", tiff, first)[0]
        for place in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind = unpack_from(f"{order}HH", tiff, place)
            if tag == ORIENTATION and kind in (SHORT, LONG):
                value = unpack_from(f"{order}{'H' if kind == SHORT else 'I'}", tiff, place + 8)[0]
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
