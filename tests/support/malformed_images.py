"""Images that are damaged, foreign, or bombs, by name: what is in the file, and what the error says of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from image_folders import encoded, noise
from PIL import Image

PICTURE = noise(40, 60)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, width: int = 8, height: int = 8, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG of a header and these chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def inflating(megabytes: int) -> bytes:
    """Compressed zeros, a thousandth of their size; the same compressed megabyte again and again."""
    stream = zlib.compressobj(9)
    first = stream.compress(bytes(2**20)) + stream.flush(zlib.Z_FULL_FLUSH)
    again = stream.compress(bytes(2**20)) + stream.flush(zlib.Z_FULL_FLUSH)
    return first + again * (megabytes - 1) + stream.flush()


def jpeg(width: int, height: int, marker: int = 0xC0) -> bytes:
    """A small picture that claims another size: only the first lines are there."""
    data = bytearray(encoded(PICTURE, "JPEG", progressive=marker == 0xC2))
    frame = data.index(bytes([0xFF, marker]))
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    """The chunk of an extended WEBP that gives its size."""
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def exif_bomb(entries: int = 20_000, each: int = 500_000) -> bytes:
    """EXIF whose entries all point at the same half megabyte: 10 GB for a parser that copies it for each."""
    rows = b"".join(struct.pack("<HHII", 1000 + n, 7, each, 8) for n in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + rows + bytes(each)


def with_segments(data: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with application data, in as many segments as they need."""
    parts = [content[at : at + 65_000] for at in range(0, len(content), 65_000)]
    head = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in parts)
    return data[:2] + head + data[2:]


def _scan_bomb() -> bytes:
    data = encoded(noise(64, 64), "JPEG", progressive=True)
    scan, end = data.rindex(b"\xff\xda"), len(data) - 2
    return jpeg(2000, 2000, 0xC2)[:-2] + data[scan:end] * 5_000 + data[end:]


def _many_frames(format: str) -> bytes:
    first, second = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    return encoded(first, format, save_all=True, append_images=[second, first] * 200)


def _text_bomb() -> bytes:
    inflated = zlib.compress(bytes(2**20 - 9), 9)
    wide = "\U0001f600".encode() + bytes(2**20 - 99).replace(b"\0", b"a")
    texts = [chunk(b"zTXt", b"k\0\0" + inflated)] * 50 + [chunk(b"iTXt", b"k\0\0\0\0\0" + wide)] * 20
    return png(*texts, chunk(b"IDAT", zlib.compress(bytes(8 * 25))))


Content = Callable[[], tuple[bytes, str]]  # what is in the file, and what the error says; nothing: it is decoded

REFUSED: dict[str, Content] = {
    "empty image": lambda: (b"", "not a JPEG, PNG or WEBP image"),
    "text for an image": lambda: (b"<html>404</html>", "not a JPEG, PNG or WEBP image"),
    "gif": lambda: (encoded(PICTURE, "GIF"), "not a JPEG, PNG or WEBP image"),
    "tiff": lambda: (encoded(PICTURE, "TIFF"), "not a JPEG, PNG or WEBP image"),
    "bmp": lambda: (encoded(PICTURE, "BMP"), "not a JPEG, PNG or WEBP image"),
    "postscript": lambda: (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a JPEG, PNG or WEBP image"),
    "svg": lambda: (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG, PNG or WEBP image"),
    "pickle for an image": lambda: (b"\x80\x04\x95\x10", "not a JPEG, PNG or WEBP image"),
    "cut jpeg": lambda: (encoded(PICTURE, "JPEG")[:1500], "truncated"),
    "jpeg cut in its header": lambda: (encoded(PICTURE, "JPEG")[:100], "damaged JPEG"),
    "cut png": lambda: (encoded(PICTURE)[:3000], "truncated"),
    "cut webp": lambda: (encoded(PICTURE, "WEBP")[:300], "damaged WEBP"),
    "png with a flipped bit": lambda: (encoded(PICTURE)[:500] + b"\xaa" + encoded(PICTURE)[501:], "damaged PNG"),
    "png without pixels": lambda: (png(), "damaged PNG"),
    "png of no width": lambda: (png(width=0), "damaged PNG"),
    "jpeg of no height": lambda: (jpeg(60, 0), "damaged JPEG"),
    "png of colour type 5": lambda: (png(colour=5), "damaged PNG"),
    "lossless jpeg": lambda: (jpeg(60, 40).replace(b"\xff\xc0", b"\xff\xc3"), "damaged JPEG"),
    "webp whose frame is not its canvas": lambda: (
        webp(canvas(90, 90), (b"VP8L", encoded(PICTURE, "WEBP", lossless=True)[20:])),
        "damaged WEBP",
    ),
}
BOMBS: dict[str, Content] = {  # small files that take more than half a GiB where nobody is careful
    "png of 4 gigapixels": lambda: (png(chunk(b"IDAT", zlib.compress(bytes(99))), width=65535, height=65535), "pixels"),
    "png of 2^31 pixels a side": lambda: (png(width=2**31 - 1, height=2**31 - 1), "65535 a side; scale it down"),
    "png of a long stripe": lambda: (png(width=70_000, height=9), "65535 a side"),
    "png animation on 4 gigapixels": lambda: (
        png(
            chunk(b"acTL", struct.pack(">II", 2, 0)),
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 65535, 65535, 0, 0, 1, 1, 1, 0)),  # cleared, so filled, at once
            chunk(b"IDAT", zlib.compress(bytes(99))),
            width=65535,
            height=65535,
        ),
        "65535 x 65535 pixels, accepted are 64000000",
    ),
    "png that inflates to 1 GB": lambda: (png(chunk(b"IDAT", inflating(1024))), ""),
    "png with 70 MB of texts": lambda: (_text_bomb(), ""),
    "png with a profile that inflates": lambda: (
        png(chunk(b"iCCP", b"k\0\0" + inflating(512)), chunk(b"IDAT", zlib.compress(bytes(8 * 25)))),
        "",
    ),
    "png with an exif bomb": lambda: (png(chunk(b"eXIf", exif_bomb()), chunk(b"IDAT", zlib.compress(bytes(200)))), ""),
    "png of many frames": lambda: (_many_frames("PNG"), ""),
    "jpeg of 4 gigapixels": lambda: (jpeg(65535, 65535), "cannot hold 65535 x 65535 pixels"),
    "jpeg of 200 megapixels, most of them missing": lambda: (jpeg(14400, 14400), "cannot hold 14400"),
    "progressive jpeg of 58 megapixels": lambda: (
        jpeg(9000, 6400, 0xC2)[:-2] + bytes(10**6) + b"\xff\xd9",
        "9000 x 6400 pixels take 551 MiB to decode, accepted are 512; scale it down",
    ),
    "jpeg of 5000 scans": lambda: (_scan_bomb(), "more than 100 scans"),
    "jpeg with an exif bomb": lambda: (with_segments(encoded(PICTURE, "JPEG"), 0xE1, exif_bomb()), ""),
    "webp of 268 megapixels": lambda: (
        webp((b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(9))),
        "16383 x 16383 pixels, accepted are 64000000",
    ),
    "webp animation on 268 megapixels": lambda: (
        webp(canvas(16383, 16383, 2), (b"ANIM", bytes(6)), (b"ANMF", bytes(30))),
        "damaged WEBP",
    ),
    "webp of many frames": lambda: (_many_frames("WEBP"), ""),
}
