"""Images: crops are exact, pictures of all kinds become upright RGB, and no file costs more than its bound."""

from __future__ import annotations

import re
import struct
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from image_folders import encoded, noise
from malformed_images import BOMBS, REFUSED, jpeg
from peak_memory import peak_memory
from PIL import Image
from workers import wait_for

from data_pipeline.images import decoding
from data_pipeline.images.decoding import (
    MAX_DECODING_BYTES,
    DecodingBudget,
    ImageTransform,
    decode_image,
    exif_orientation,
    label_of,
    map_in_threads,
    read_header,
)
from data_pipeline.shards.members import Sample

# red, green, blue, white: no two corners are alike, so that turns show
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
SQUARES = CORNERS.repeat(16, 0).repeat(24, 1)  # 32 x 48: colours that a JPEG keeps


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "Camera" * 20
    tags[0x0112] = orientation
    return tags


def corners(image: Image.Image) -> list[list[list[int]]]:
    """The colours in the middle of the four quarters, rounded to black or full."""
    pixels = np.asarray(image).astype(int)
    height, width = pixels.shape[:2]
    found = pixels[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2]
    return ((found > 127) * 255).tolist()


def test_a_random_crop_is_a_slice_of_the_pixels() -> None:
    pixels = noise(12, 9)
    transform = ImageTransform(image_size=8, resize_ratio=1.125)  # short side 9: already there, so nothing is resampled
    top_left = transform.random_crop(Image.fromarray(pixels), np.array([0.0, 0.0, 0.9]))
    bottom_right = transform.random_crop(Image.fromarray(pixels), np.array([0.999, 0.999, 0.9]))
    assert np.array_equal(top_left, pixels[:8, :8]) and np.array_equal(bottom_right, pixels[4:, 1:])


def test_every_crop_is_equally_likely() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8)[:, None].repeat(4, 1))
    transform = ImageTransform(image_size=4, resize_ratio=1.0)
    values = np.linspace(0, 1, 300, endpoint=False)
    tops = [np.asarray(transform.random_crop(image, np.array([u, 0, 0])))[0, 0] for u in values]
    assert Counter(tops) == {0: 100, 1: 100, 2: 100}


@pytest.mark.parametrize("margin, start", [(6, 3), (3, 2), (5, 2)])
def test_the_centre_crop_rounds_half_a_pixel_to_even(margin: int, start: int) -> None:
    """torchvision's CenterCrop, which the public code uses: int(round(margin / 2)), in both directions."""
    transform = ImageTransform(image_size=8, resize_ratio=1.0)
    wide = noise(8, 8 + margin)
    for pixels in (wide, wide.swapaxes(0, 1).copy()):
        expected = pixels[:, start : start + 8] if pixels is wide else pixels[start : start + 8]
        assert np.array_equal(transform.center_crop(Image.fromarray(pixels)), expected)


def test_the_short_side_is_scaled_with_lanczos_before_cropping() -> None:
    """The public code resizes to 1.125 x S with LANCZOS; another filter gives other pixels."""
    image = Image.fromarray(noise(40, 60))
    scaled = image.resize((27, 18), Image.Resampling.LANCZOS)
    transform = ImageTransform(image_size=16)
    assert np.array_equal(transform.random_crop(image, np.zeros(3)), scaled.crop((0, 0, 16, 16)))
    assert np.array_equal(transform.center_crop(image), scaled.crop((6, 1, 22, 17)))


def test_flip_happens_below_one_half_and_only_if_asked() -> None:
    pixels = noise(8, 8)
    for flip, uniform, expected in [(True, 0.49, pixels[:, ::-1]), (True, 0.5, pixels), (False, 0.49, pixels)]:
        crop = ImageTransform(8, 1.0, flip=flip).random_crop(Image.fromarray(pixels), np.array([0, 0, uniform]))
        assert np.array_equal(crop, expected)


@pytest.mark.parametrize("size", [(31, 500), (500, 31), (33, 33), (5, 6)])
def test_crops_of_any_image_have_the_right_size(size: tuple[int, int]) -> None:
    transform, image = ImageTransform(image_size=32), Image.fromarray(noise(*size))
    assert transform.center_crop(image).size == (32, 32)
    assert transform.random_crop(image, np.array([0.999, 0.999, 0.0])).size == (32, 32)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"image_size": 8, "resize_ratio": 0.9}])
def test_impossible_transforms_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        ImageTransform(**options)


def test_a_stripe_is_cropped_as_if_it_were_scaled_whole_without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ImageTransform(image_size=16)
    for size in ((60, 4), (4, 60), (60, 50)):
        image, uniforms = Image.fromarray(noise(*size)), np.array([0.7, 0.4, 0.9])
        whole = [np.asarray(transform.random_crop(image, uniforms)), np.asarray(transform.center_crop(image))]
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "MAX_PIXELS", 100)
            parts = [np.asarray(transform.random_crop(image, uniforms)), np.asarray(transform.center_crop(image))]
        assert np.abs(np.stack(whole).astype(int) - np.stack(parts)).max() <= 1
    stripe, transform = Image.new("RGB", (60_000, 1), "red"), ImageTransform(image_size=256)
    assert peak_memory(lambda: transform.random_crop(stripe, np.full(3, 0.999))) < 2**22
    assert transform.center_crop(stripe).getextrema() == ((255, 255), (0, 0), (0, 0))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoding_turns_images_upright(format: str, orientation: int) -> None:
    header = read_header(encoded(SQUARES, format, exif=exif(orientation)))
    image = header.decode()
    # EXIF 2.3, 4.6.4: where row 0 and column 0 of what is stored are to be shown
    turned = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.swapaxes(0, 1),
        6: np.rot90(CORNERS, -1),
        7: CORNERS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(CORNERS),
    }
    assert (header.format, header.width, header.height) == (format, 48, 32)
    assert image.mode == "RGB" and image.size == header.upright_size == ((48, 32) if orientation < 5 else (32, 48))
    assert corners(image) == turned[orientation].tolist()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"Exif\0\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"),
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",  # orientation 9
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0\x06\0\0\0",  # as text
    ],
)
def test_exif_that_says_nothing_means_upright(data: bytes) -> None:
    assert exif_orientation(data) == 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind, form", [(3, "HH"), (4, "I")])
def test_orientation_is_read_in_either_byte_order_as_short_or_long(order: str, kind: int, form: str) -> None:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    value = struct.pack(f"{order}{form}", *(6, 0)[: len(form)])
    assert exif_orientation(head + struct.pack(f"{order}HHHI", 1, 0x0112, kind, 1) + value) == 6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "format, mode, options",
    [
        ("JPEG", "CMYK", {}),  # Pillow writes it as Adobe does, inverted
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "YCbCr", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 2}),
        ("JPEG", "RGB", {"keep_rgb": True}),  # not converted to YCbCr, which its Adobe marker says
        ("JPEG", "RGB", {"icc_profile": b"profile" * 20_000, "xmp": b"xmp" * 99, "comment": "words"}),
        ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]}),  # a phone's second picture
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 0}),
        ("PNG", "P", {"transparency": bytes(range(200))}),
        ("PNG", "RGB", {"transparency": (255, 0, 0)}),
        ("PNG", "RGBA", {"icc_profile": b"profile" * 999}),
        ("PNG", "RGBA", {"save_all": True, "append_images": [Image.new("RGBA", (48, 32))]}),  # an animation
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": False}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (48, 32))], "lossless": True}),
    ],
)
def test_colours_of_the_first_picture_are_right_in_every_mode(format: str, mode: str, options: dict) -> None:
    assert corners(decode_image(encoded(Image.fromarray(SQUARES).convert(mode), format, **options))) == CORNERS.tolist()


def test_the_inks_of_a_cmyk_jpeg_are_not_inverted_twice() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100)
    red, green, blue = decode_image(data).getpixel((8, 8))
    assert b"Adobe" in data and red < 5 and green > 250 and blue > 250


def test_colours_under_transparency_stay_as_they_are_stored() -> None:
    pixels = np.dstack([SQUARES, np.zeros((32, 48), dtype=np.uint8)])
    assert corners(decode_image(encoded(pixels))) == CORNERS.tolist()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode, shades", [("1", [0, 255]), ("L", [0, 100]), ("LA", [0, 100]), ("I;16", [0x40, 0x80])])
def test_grey_keeps_its_shades(mode: str, shades: list[int], orientation: int) -> None:
    if mode == "I;16":
        grey = Image.fromarray(np.array([shades], dtype=np.uint16) * 256)
    else:
        grey = Image.fromarray(np.array([shades], dtype=np.uint8)).convert(mode)
    found = decode_image(encoded(grey, "PNG", exif=exif(orientation)))
    assert np.asarray(found).reshape(-1, 3).tolist() == [[shade] * 3 for shade in shades]


@pytest.mark.parametrize("scale, size", [(2, (24, 16)), (4, (12, 8)), (8, (6, 4))])
def test_a_large_photograph_comes_scaled_down_and_others_are_refused(
    monkeypatch: pytest.MonkeyPatch, scale: int, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", most := 48 * 32 // scale**2)
    header = read_header(encoded(SQUARES, "JPEG", exif=exif(6)))
    image = header.decode()
    assert image.size == size[::-1] and header.scale == scale and header.upright_size == (32, 48)
    for options in ({"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "WEBP"}):
        with pytest.raises(ValueError, match=f"48 x 32 pixels, accepted are {most} .*; scale it down"):
            decode_image(encoded(SQUARES, **options))


def test_a_cameras_200_megapixels_are_decoded_within_the_memory() -> None:
    photograph = jpeg(16320, 12240)[:-2] + bytes(2 * 10**6) + b"\xff\xd9"  # what it takes depends on the size only
    found: list[Image.Image] = []
    assert peak_memory(lambda: found.append(decode_image(photograph))) < MAX_DECODING_BYTES
    assert found[0].size == (8160, 6120)


@pytest.mark.parametrize(
    "format, channels, options", [("WEBP", 4, {}), ("PNG", 4, {}), ("JPEG", 3, {"progressive": True})]
)
def test_decoding_and_turning_take_the_memory_that_the_header_says(format: str, channels: int, options: dict) -> None:
    header = read_header(encoded(np.zeros((1500, 2000, channels), np.uint8), format, exif=exif(6), **options))
    assert 0.4 * header.num_bytes < peak_memory(header.decode) < header.num_bytes + 2**22


def test_a_jpeg_whose_colours_come_one_after_the_other_counts_as_held_whole() -> None:
    data = encoded(SQUARES, "JPEG", subsampling=0)
    scan = data.index(b"\xff\xda")
    first_colour = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"  # the header of a scan of the first component alone
    by_lines, whole = read_header(data), read_header(data[:scan] + first_colour + bytes(2000))
    assert by_lines.num_bytes == 48 * 32 * 8 + len(data)
    assert whole.num_bytes == 48 * 32 * (4 + 2 * 3) + scan + 2010


def test_a_jpeg_that_is_too_short_for_its_size_is_no_grey_picture() -> None:
    """The decoder would fill what is missing with grey, without a word."""
    with pytest.raises(ValueError, match="bytes cannot hold 4000 x 3000 pixels"):
        decode_image(jpeg(4000, 3000))
    one_colour = encoded(Image.new("RGB", (4000, 3000), "green"), "JPEG", quality=1, optimize=True)
    assert read_header(one_colour).width == 4000  # as short as a whole one can be


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_image_is_refused_in_one_line(name: str) -> None:
    content, reason = REFUSED[name]()
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        decode_image(content)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_fills_the_memory(name: str) -> None:
    content, reason = BOMBS[name]()
    errors: list[str] = []

    def decode() -> None:
        try:
            decode_image(content)
        except ValueError as error:
            errors.append(str(error))

    start = time.monotonic()
    assert peak_memory(decode) < MAX_DECODING_BYTES / 2  # no bomb is a picture of the largest size
    assert time.monotonic() - start < 5
    assert bool(errors) == bool(reason) and reason in "".join(errors)


@pytest.mark.filterwarnings("error")
def test_flipped_bytes_never_raise_anything_but_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP"):
        data = encoded(noise(9, 12), format, exif=exif(6))
        for _ in range(300):
            damaged = bytearray(data)
            for position in random.integers(0, len(damaged), 3):
                damaged[position] = random.integers(256)
            try:
                image = decode_image(bytes(damaged))
            except ValueError:
                continue
            assert image.mode == "RGB"


def test_threads_decode_together_only_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encoded(np.zeros((500, 500), dtype=np.uint8))
    monkeypatch.setattr(decoding, "MAX_DECODING_BYTES", int(2.5 * read_header(large).num_bytes))
    budget, lock = DecodingBudget(), threading.Lock()
    in_use = most = 0

    def use(data: bytes) -> tuple[int, int]:
        nonlocal in_use, most
        with budget.decoded(read_header(data)) as image:
            with lock:
                in_use += data is large
                most = max(most, in_use)
            time.sleep(0.01)
            with lock:
                in_use -= data is large
        return image.size

    small = encoded(SQUARES)
    sizes = list(map_in_threads(use, [large, small, large, small, large], ahead=8))
    assert sizes == [(500, 500), (48, 32), (500, 500), (48, 32), (500, 500)] and most <= 2


def test_a_budget_gives_back_what_a_damaged_image_took(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encoded(noise(100, 100))
    monkeypatch.setattr(decoding, "MAX_DECODING_BYTES", read_header(large).num_bytes)
    budget = DecodingBudget()
    for _ in range(3):  # each takes all there is
        with pytest.raises(ValueError, match="truncated"), budget.decoded(read_header(large[:-9000])):
            pass
    with budget.decoded(read_header(encoded(SQUARES))) as image:
        assert image.size == (48, 32)


def test_threads_work_on_while_results_are_in_use_but_not_without_end() -> None:
    made: list[int] = []
    results = map_in_threads(made.append, range(1000), ahead=20)
    taken = len(list(islice(results, 30)))
    wait_for(lambda: len(made) == taken + 20)
    time.sleep(0.02)
    assert len(made) == taken + 20  # nobody has asked for more
    assert len([*results]) == 970 and sorted(made) == list(range(1000))


def test_what_waits_for_a_thread_is_dropped_on_an_error() -> None:
    begun: list[int] = []

    def fail(number: int) -> None:
        begun.append(number)
        time.sleep(0.01)
        raise ValueError(f"{number} is bad")

    with pytest.raises(ValueError, match="0 is bad"):
        list(map_in_threads(fail, range(1000), ahead=500))
    assert len(begun) < 500


@pytest.mark.parametrize(
    "members, label",
    [
        ({"cls": b"7"}, 7),
        ({"cls": b"12\n"}, 12),
        ({"json": b'{"label": 3}'}, 3),
        ({"cls": b"1", "json": b"{}"}, 1),
        ({"png": b""}, "no label among the members"),
        ({"cls": b""}, "expected a class number"),
        ({"cls": b"-1"}, "expected a class number"),
        ({"cls": "\u0663".encode()}, "expected a class number"),
        ({"cls": b"9" * 5000}, "expected a class number"),
        ({"json": b"{"}, "not valid JSON"),
        ({"json": b'{"label": 3, "score": NaN, "seed": %s}' % (b"9" * 5000)}, 3),
        ({"json": b'\xef\xbb\xbf{"label": 3, "text": "caf\xe9", "area": -Infinity}'}, 3),
        ({"json": b'{"label": "0"}'}, 0),
        ({"json": b'{"label": 1.0}'}, 1),
        ({"json": b"[3]"}, "expected one class number"),
        ({"json": b'[["label", 3]]'}, "expected one class number"),
        ({"json": b'{"label": 3, "label": 4}'}, "2 fields label"),
        ({"json": b"[" * 10**5}, "not valid JSON"),
        ({"json": b'{"label": true}'}, "as label True, expected a class number"),
        ({"json": b'{"label": 1.5}'}, "as label 1.5, expected a class number"),
        ({"json": b'{"label": "one"}'}, "as label 'one', expected a class number"),
        ({"json": b'{"label": NaN}'}, "expected a class number"),
        ({"json": b'{"label": 1e999}'}, "expected a class number"),
        ({"json": b'{"label": null}'}, "expected a class number"),
        ({"cls": b"65536"}, "expected a class number from 0 to 65535"),
        ({"json": b'{"label": 1, "text": "%s"}' % bytes(2**20)}, "at most"),
    ],
)
def test_the_class_is_that_of_cls_or_json_and_anything_else_is_refused(
    members: dict[str, bytes], label: int | str
) -> None:
    if isinstance(label, int):
        assert label_of(Sample("a", members)) == label
    else:
        with pytest.raises(ValueError, match=label):
            label_of(Sample("a", members))
