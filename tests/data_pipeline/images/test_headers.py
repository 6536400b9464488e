"""Headers of images: size, orientation and memory are known before decoding, and what is no pixel is left out."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.images.headers import MAX_SCANS, StoredImage, exif_orientation, read_header

FORMATS = st.sampled_from(["JPEG", "PNG", "WEBP"])
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)


def stored(format: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "Camera" * 20
    tags[0x0112] = orientation
    return tags


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_format_size_and_orientation_are_read_without_decoding(format: str, orientation: int | None) -> None:
    header = read_header(stored(format, **({"exif": exif(orientation)} if orientation else {})))
    assert (header.format, header.width, header.height) == (format, 14, 10)
    assert header.orientation == (orientation or 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_all_that_is_no_pixel_is_left_out_and_the_pixels_are_the_same(format: str) -> None:
    options = {"exif": exif(6), "icc_profile": b"profile" * 99, "xmp": b"xmp" * 99, "quality": 90, "comment": "words"}
    data = stored(format, **options)
    header = read_header(data)
    assert b"Camera" not in header.pixels and b"profile" not in header.pixels and b"xmp" not in header.pixels
    assert len(header.pixels) < len(data)
    left, whole = (Image.open(io.BytesIO(content)) for content in (header.pixels, data))
    assert set(left.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi"} | {
        *("loop", "background", "timestamp", "duration")
    }
    assert left.tobytes() == whole.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_file_of_nothing_but_pixels_is_not_copied(format: str) -> None:
    data = stored(format)
    assert read_header(data).pixels is data


@pytest.mark.parametrize(
    "data, bytes_per_pixel, is_scalable",
    [
        (stored("JPEG"), 4, True),
        (stored("JPEG", exif=exif(6)), 8, True),  # before and after it is turned
        (stored("JPEG", "CMYK"), 8, True),
        (stored("JPEG", "L"), 5, True),
        (stored("JPEG", progressive=True, subsampling=0), 2 * 3 + 4, False),  # two bytes for every coefficient
        (stored("JPEG", progressive=True, subsampling=2), 2 * 1.5 + 4, False),
        (stored("JPEG", "CMYK", progressive=True, subsampling=0), 2 * 4 + 4, False),
        (stored("PNG"), 4, False),
        (stored("PNG", "RGBA"), 8, False),
        (stored("PNG", "LA"), 8, False),
        (stored("PNG", "P"), 5, False),
        (stored("PNG", "1"), 5, False),
        (stored("PNG", "I;16"), 8, False),
        (stored("WEBP"), 16, False),
    ],
)
def test_the_memory_of_decoding_follows_from_the_header(data: bytes, bytes_per_pixel: float, is_scalable: bool) -> None:
    header = read_header(data)
    assert (header.bytes_per_pixel, header.is_scalable) == (bytes_per_pixel, is_scalable)
    assert header.memory() == int(140 * bytes_per_pixel) + len(header.pixels)


def test_sizes_at_a_fraction_are_rounded_up() -> None:
    header = StoredImage("JPEG", 1001, 999, 1, 4, True, b"123")
    assert header.num_pixels(2) == 501 * 500 and header.memory(8) == 126 * 125 * 4 + 3


def test_a_baseline_jpeg_in_several_scans_is_not_taken_for_one_that_is_read_line_by_line() -> None:
    data = bytearray(stored("JPEG", subsampling=0))
    scan = data.index(b"\xff\xda")
    header = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # a scan of the first component alone
    assert not read_header(bytes(data[:scan]) + header + b"\x12\xff\xd9").is_scalable


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.fromarray(PIXELS + number) for number in range(3)]
    for format in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
        left = Image.open(io.BytesIO(read_header(buffer.getvalue()).pixels))
        assert not getattr(left, "is_animated", False)
        assert np.array_equal(np.asarray(left.convert("RGB")), PIXELS)


def test_the_second_image_of_a_phones_jpeg_is_not_looked_at() -> None:
    buffer = io.BytesIO()
    second = Image.fromarray(PIXELS[::-1].copy())
    Image.fromarray(PIXELS).save(buffer, "MPO", save_all=True, append_images=[second])
    left = Image.open(io.BytesIO(read_header(buffer.getvalue()).pixels))
    assert left.format == "JPEG"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"\xff\xd8\xff", "cut short"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "cut short"),
        (b"\xff\xd8\xff\xd9", "cut short"),
        (b"\xff\xd8\xff\xdb\x00\x01", "cut short"),
        (b"\xff\xd8\xff\xda\x00\x03\x01", "without a frame header"),
        (b"\xff\xd8\xff\xc3\x00\x0b\x08\x00\x01\x00\x01\x01\x01\x11\x00", "SOF3.: lossless or arithmetic"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x0c\x00\x01\x00\x01\x01\x01\x11\x00", "1 components of 12 bits"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x08\x00\x01\x00\x01\x01\x01\x01\x00", "impossible sampling factors"),
        (2 * b"\xff\xc0\x00\x0b\x08\x00\x01\x00\x01\x01\x01\x11\x00", "two frame headers"),
        (b"\xff\xd8" + 60_000 * b"\xff\xfe\x00\x02", "more than 50000 segments"),
        (b"\x89PNG\r\n\x1a\n", "does not begin with its header"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 5, 0, 0, 0)), "colour type 5"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 1, 8, 2, 0, 0, 0)), "0 x 1 pixels; each"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 70000, 1, 8, 2, 0, 0, 0)), "70000 x 1 pixels"),
        (stored("PNG")[:33] + 60_000 * chunk(b"teXt", b""), "more than 50000 chunks"),
        (b"RIFF\x00\x00\x00\x00WEBP", "cut short"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8L", "cut short"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 \x02\x00\x00\x00ab", "cut short"),
        (b"RIFF\x00\x00\x00\x00WAVE", "not a JPEG, PNG or WEBP"),
        (b"", "not a JPEG, PNG or WEBP"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    data = data if not data.startswith(b"\xff\xc0") else b"\xff\xd8" + data
    with pytest.raises(ValueError, match=reason):
        read_header(data)


def test_a_jpeg_that_is_too_short_for_its_size_is_no_grey_picture() -> None:
    """What is missing would be filled with grey, without a word."""
    data = bytearray(stored("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 3000, 4000)
    with pytest.raises(ValueError, match=f"{len(data)} bytes cannot hold 4000 x 3000 pixels"):
        read_header(bytes(data))
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 3000), "green").save(buffer, "JPEG", quality=1, optimize=True)
    assert read_header(buffer.getvalue()).width == 4000  # of one colour: as short as a whole one can be


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = stored("JPEG", progressive=True)
    scan, end = data.rindex(b"\xff\xda"), len(data) - 2
    assert read_header(data)
    with pytest.raises(ValueError, match=f"more than {MAX_SCANS} scans"):
        read_header(data[:end] + data[scan:end] * MAX_SCANS + data[end:])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Exif\0\0",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",  # orientation 9
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0\0\0",  # as text
    ],
)
def test_exif_data_that_say_nothing_mean_upright(data: bytes) -> None:
    assert exif_orientation(data) == 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind, form", [(3, "HH"), (4, "I")])
def test_orientation_is_read_in_either_byte_order_as_short_or_long(order: str, kind: int, form: str) -> None:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    value = struct.pack(f"{order}{form}", *(6, 0)[: len(form)])
    assert exif_orientation(head + struct.pack(f"{order}HHHI", 1, 0x0112, kind, 1) + value) == 6


@settings(max_examples=300, deadline=None)
@given(FORMATS, st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_damaged_bytes_raise_nothing_but_value_error(format: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(stored(format, exif=exif(6)))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        header = read_header(bytes(data))
    except ValueError:
        return
    assert header.width and header.height and 1 <= header.orientation <= 8 and header.bytes_per_pixel >= 4
