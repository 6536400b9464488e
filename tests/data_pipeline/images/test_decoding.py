"""Images: views are exact crops, and decoding is safe."""

from __future__ import annotations

import io
import re
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from image_folders import encoded, noise
from malformed_images import BOMBS, REFUSED, jpeg
from peak_memory import BOUND, peak_memory
from PIL import Image
from workers import wait_for

from data_pipeline.images.decoding import (
    DecodingBudget,
    ImageTransform,
    decode_image,
    map_in_threads,
    resize_short_side,
)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1


def test_a_random_view_is_a_slice_of_the_pixels() -> None:
    pixels = noise(12, 9)
    image = Image.fromarray(pixels)
    transform = ImageTransform(image_size=8, resize_ratio=1.125)  # short side 9: already there, so nothing is resampled
    top_left = transform.random_view(image, np.array([0.0, 0.0, 0.9]))
    bottom_right = transform.random_view(image, np.array([0.999, 0.999, 0.9]))
    torch.testing.assert_close(top_left, as_tensor(pixels[:8, :8]), rtol=0, atol=0)
    torch.testing.assert_close(bottom_right, as_tensor(pixels[4:, 1:]), rtol=0, atol=0)


def test_every_crop_is_equally_likely() -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8)[:, None].repeat(4, 1))
    transform = ImageTransform(image_size=4, resize_ratio=1.0)
    values = np.linspace(0, 1, 300, endpoint=False)
    tops = [transform.random_view(image.convert("RGB"), np.array([u, 0, 0]))[0, 0, 0] for u in values]
    assert sorted(Counter(round((float(top) + 1) * 255 / 2) for top in tops).items()) == [(0, 100), (1, 100), (2, 100)]


def test_the_centre_view_is_the_centre() -> None:
    pixels = noise(8, 14)
    view = ImageTransform(image_size=8, resize_ratio=1.0).center_view(Image.fromarray(pixels))
    torch.testing.assert_close(view, as_tensor(pixels[:, 3:11]), rtol=0, atol=0)


def test_flip_happens_below_one_half_and_only_if_asked() -> None:
    pixels = noise(8, 8)
    image = Image.fromarray(pixels)
    flipping, plain = ImageTransform(8, 1.0, flip=True), ImageTransform(8, 1.0)
    mirrored = as_tensor(np.ascontiguousarray(pixels[:, ::-1]))
    torch.testing.assert_close(flipping.random_view(image, np.array([0, 0, 0.49])), mirrored)
    torch.testing.assert_close(flipping.random_view(image, np.array([0, 0, 0.5])), as_tensor(pixels))
    torch.testing.assert_close(plain.random_view(image, np.array([0, 0, 0.49])), as_tensor(pixels))


@pytest.mark.parametrize("size", [(31, 500), (500, 31), (33, 33), (5, 6)])
def test_views_of_any_image_have_the_right_size_and_range(size: tuple[int, int]) -> None:
    transform = ImageTransform(image_size=32)
    image = Image.fromarray(noise(*size))
    for view in (transform.center_view(image), transform.random_view(image, np.array([0.999, 0.999, 0.0]))):
        assert view.shape == (3, 32, 32) and view.dtype == torch.float32
        assert view.min() >= -1 and view.max() <= 1


@pytest.mark.parametrize("options", [{"image_size": 0}, {"image_size": 8, "resize_ratio": 0.9}])
def test_impossible_transforms_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        ImageTransform(**options)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_decoded(format: str) -> None:
    image = decode_image(encoded(noise(9, 12), format))
    assert image.mode == "RGB" and image.size == (12, 9)


# red, green, blue, white: no two corners are alike, so that turns show
CORNERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
SQUARES = CORNERS.repeat(16, 0).repeat(24, 1)  # 32 x 48: colours that a JPEG keeps


def corners(image: Image.Image) -> list[list[list[int]]]:
    """The colours in the middle of the four quarters, rounded to black or full."""
    pixels = np.asarray(image).astype(int)
    height, width = pixels.shape[:2]
    found = pixels[height // 4 :: height // 2, width // 4 :: width // 2][:2, :2]
    return ((found > 127) * 255).tolist()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoding_turns_images_upright(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(SQUARES, format, exif=exif))
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
    assert image.mode == "RGB" and image.size == ((48, 32) if orientation < 5 else (32, 48))
    assert corners(image) == turned[orientation].tolist()


@pytest.mark.parametrize(
    "format, mode, options",
    [
        ("JPEG", "CMYK", {}),  # Pillow writes it as Adobe does, inverted
        ("JPEG", "CMYK", {"progressive": True}),
        ("JPEG", "YCbCr", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 2}),
        ("JPEG", "RGB", {"keep_rgb": True}),  # not converted to YCbCr, which its Adobe marker says
        ("PNG", "P", {}),
        ("PNG", "P", {"transparency": 0}),
        ("PNG", "RGB", {"transparency": (255, 0, 0)}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("WEBP", "RGBA", {"lossless": False}),
    ],
)
def test_colours_are_right_in_every_mode(format: str, mode: str, options: dict) -> None:
    buffer = io.BytesIO()
    Image.fromarray(SQUARES).convert(mode).save(buffer, format, **options)
    assert corners(decode_image(buffer.getvalue())) == CORNERS.tolist()


def test_the_inks_of_a_cmyk_jpeg_are_not_inverted_twice() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    buffer = io.BytesIO()
    cyan.save(buffer, "JPEG", quality=100)
    assert b"Adobe" in buffer.getvalue()
    red, green, blue = decode_image(buffer.getvalue()).getpixel((8, 8))
    assert red < 5 and green > 250 and blue > 250


def test_colours_under_transparency_stay_as_they_are_stored() -> None:
    pixels = np.dstack([SQUARES, np.zeros((32, 48), dtype=np.uint8)])
    assert corners(decode_image(encoded(pixels))) == CORNERS.tolist()


@pytest.mark.parametrize("mode, shades", [("1", [0, 255]), ("L", [0, 100]), ("LA", [0, 100])])
@pytest.mark.parametrize("orientation", [1, 6])
def test_grey_keeps_its_shades(mode: str, shades: list[int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.array([shades], dtype=np.uint8)).convert(mode).save(buffer, "PNG", exif=exif)
    assert np.asarray(decode_image(buffer.getvalue())).reshape(-1, 3).tolist() == [[shade] * 3 for shade in shades]


@pytest.mark.parametrize("orientation", [1, 3])
def test_sixteen_bit_grey_keeps_its_shades(orientation: int) -> None:
    grey = np.array([[0, 0x4000], [0x8000, 0xFFFF]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = grey if orientation == 1 else grey[::-1, ::-1].copy()
    found = np.array(decode_image(encoded(stored, exif=exif)))
    assert found[..., 0].tolist() == [[0, 0x40], [0x80, 0xFF]] and found.shape == (2, 2, 3)


def test_an_animation_is_its_first_frame() -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for format in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        first.save(buffer, format, save_all=True, append_images=[second], lossless=True)
        assert decode_image(buffer.getvalue()).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("scale, size", [(2, (24, 16)), (4, (12, 8)), (8, (6, 4))])
def test_a_large_photograph_comes_scaled_down(scale: int, size: tuple[int, int]) -> None:
    most = 48 * 32 // scale**2
    image = decode_image(encoded(SQUARES, "JPEG"), max_pixels=most)
    assert image.size == size and corners(image) == CORNERS.tolist()
    with pytest.raises(ValueError, match="48 x 32 pixels, at most 23 are accepted; scale it down"):
        decode_image(encoded(SQUARES, "JPEG"), max_pixels=23)
    for options in ({"format": "JPEG", "progressive": True}, {"format": "PNG"}, {"format": "WEBP"}):
        with pytest.raises(ValueError, match=f"48 x 32 pixels, at most {most} are accepted; scale it down"):
            decode_image(encoded(SQUARES, **options), max_pixels=most)


def test_a_cameras_200_megapixels_are_decoded_within_the_memory() -> None:
    photograph = jpeg(16320, 12240)[:-2] + bytes(2 * 10**6) + b"\xff\xd9"  # what it takes depends on the size only
    found: list[Image.Image] = []
    assert peak_memory(lambda: found.append(decode_image(photograph))) < BOUND
    assert found[0].size == (8160, 6120)


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_image_is_refused_in_one_line(name: str) -> None:
    content, reason = REFUSED[name]()
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        decode_image(content)
    assert str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_fills_the_memory(name: str) -> None:
    content, reason = BOMBS[name]()
    said: list[str] = []

    def decode() -> None:
        try:
            decode_image(content)
        except ValueError as error:
            said.append(str(error))

    start = time.monotonic()
    assert peak_memory(decode) < BOUND
    assert time.monotonic() - start < 5
    assert bool(said) == bool(reason) and reason in "".join(said)


def test_a_stripe_is_not_blown_up() -> None:
    stripe = Image.new("RGB", (60_000, 10))
    with pytest.raises(ValueError, match="60000 x 10 pixels: too narrow, it would become 1728000 x 288"):
        resize_short_side(stripe, 288)


@pytest.mark.filterwarnings("error")
def test_flipped_bytes_never_raise_anything_but_value_error() -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded(noise(9, 12)), encoded(noise(9, 12), "JPEG", exif=exif), encoded(noise(9, 12), "WEBP")):
        for _ in range(300):
            damaged = bytearray(data)
            for position in random.integers(0, len(damaged), 3):
                damaged[position] = random.integers(256)
            try:
                decode_image(bytes(damaged), max_pixels=10_000)
            except ValueError:
                pass


def test_threads_decode_together_only_what_fits() -> None:
    large = encoded(np.zeros((5000, 5000), dtype=np.uint8))  # 119 MiB while it is decoded: two of them at a time
    budget, in_use, most = DecodingBudget(), 0, 0
    lock = threading.Lock()

    def use(data: bytes) -> tuple[int, int]:
        nonlocal in_use, most
        with budget.decoded(data) as image:
            with lock:
                in_use += data is large
                most = max(most, in_use)
            size = image.size
            with lock:
                in_use -= data is large
        return size

    small = encoded(SQUARES)
    sizes = list(map_in_threads(use, [large, small, large, small, large], ahead=8))
    assert sizes == [(5000, 5000), (48, 32), (5000, 5000), (48, 32), (5000, 5000)] and most <= 2


def test_threads_work_on_while_results_are_in_use_but_not_without_end() -> None:
    made: list[int] = []
    results = map_in_threads(made.append, range(1000), ahead=20)
    taken = len(list(islice(results, 30)))
    wait_for(lambda: len(made) == taken + 20)
    time.sleep(0.05)
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


def test_a_budget_gives_back_what_a_damaged_image_took() -> None:
    budget = DecodingBudget()
    large = encoded(np.zeros((7000, 7000), dtype=np.uint8))
    for _ in range(3):  # each takes all there is
        with pytest.raises(ValueError, match="truncated"), budget.decoded(large[:-9000]):
            pass
    with budget.decoded(encoded(SQUARES)) as image:
        assert image.size == (48, 32)
