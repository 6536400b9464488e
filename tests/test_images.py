"""Images: views are exact crops, decoding is safe, and packing loses nothing without saying so."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PACK_OPTIONS

from data_pipeline.images import ImageTransform, decode_image, image_of
from data_pipeline.index import Index
from data_pipeline.labels import label_of
from data_pipeline.packing import is_packed, pack_images
from data_pipeline.reader import ShardReader


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), num_images: int = 8) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            (root / name / f"image.v{number}.png").write_bytes(encoded(noise(9, 12, seed=100 * label + number)))
    return root


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


def test_decoding_turns_images_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    assert decode_image(encoded(noise(9, 12), "JPEG", exif=exif)).size == (9, 12)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    grey = np.array([[0, 0x4000], [0x8000, 0xFFFF]], dtype=np.uint16)
    assert np.array(decode_image(encoded(grey)))[..., 0].tolist() == [[0, 0x40], [0x80, 0xFF]]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a JPEG, PNG or WEBP"),
        (b"hello", "not a JPEG, PNG or WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "not a JPEG, PNG or WEBP"),
        (encoded(noise(9, 12), "GIF"), "not a JPEG, PNG or WEBP"),
        (encoded(noise(90, 120))[:3000], None),
        (encoded(noise(90, 120), "JPEG")[:2000], None),
        (encoded(noise(90, 120), "WEBP")[:2000], None),
        (encoded(np.zeros((1001, 1000), dtype=np.uint8)), "1000 x 1001 pixels, at most 1000000"),
    ],
    ids=["empty", "text", "eps", "gif", "cut png", "cut jpeg", "cut webp", "too many pixels"],
)
def test_anything_else_is_refused_with_a_reason(data: bytes, reason: str | None) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        decode_image(data, max_pixels=1_000_000)
    assert str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow reports corrupt EXIF
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


def test_a_packed_folder_gives_every_image_back_with_its_class(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    out = tmp_path / "packed"
    assert not is_packed(out)
    report = pack_images(str(source), out, **PACK_OPTIONS)
    assert is_packed(out) and report.train == Index.read(out / "train", kind="images") and not report.skipped
    assert report.train.meta["classes"] == ["cat", "dog"]
    names = []
    for split, index in (("train", report.train), ("val", report.val)):
        reader = ShardReader(out / split, index)
        rows = [json.loads(line) for line in (out / split / "files.jsonl").read_text().splitlines()]
        names += [row["file"] for row in rows]
        for sample_id, row in enumerate(rows):
            sample = reader.read(sample_id)
            assert sample.key == row["key"] and sample.members["png"] == (source / row["file"]).read_bytes()
            assert label_of(sample) == row["label"] == ["cat", "dog"].index(row["file"].split("/")[0])
    assert len(names) == 16 and len(set(names)) == 16


def test_the_held_out_share_is_the_same_in_every_class(tmp_path: Path) -> None:
    report = pack_images(str(make_folder(tmp_path / "images")), tmp_path / "packed", **PACK_OPTIONS)
    reader = ShardReader(tmp_path / "packed/val", report.val)
    assert Counter(label_of(reader.read(i)) for i in range(len(reader))) == {0: 2, 1: 2}


def test_samples_are_shuffled_when_written(tmp_path: Path) -> None:
    report = pack_images(str(make_folder(tmp_path / "images")), tmp_path / "packed", **PACK_OPTIONS)
    reader = ShardReader(tmp_path / "packed/train", report.train)
    labels = [label_of(reader.read(i)) for i in range(len(reader))]
    assert labels != sorted(labels)


def test_existing_splits_are_kept(tmp_path: Path) -> None:
    make_folder(tmp_path / "images/train", num_images=5)
    make_folder(tmp_path / "images/val", classes=("dog",), num_images=2)
    report = pack_images(str(tmp_path / "images"), tmp_path / "packed", **PACK_OPTIONS)
    assert (report.train.num_samples, report.val.num_samples) == (10, 2)
    assert label_of(ShardReader(tmp_path / "packed/val", report.val).read(0)) == 1


def test_corrupt_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    (source / "cat/broken.jpg").write_bytes(encoded(noise(90, 120), "JPEG")[:2000])
    (source / "dog/notes.txt").write_text("not an image")
    lines: list[str] = []
    report = pack_images(str(source), tmp_path / "packed", **{**PACK_OPTIONS, "report": lines.append})
    assert report.train.num_samples + report.val.num_samples == 16
    assert sorted(name for name, _ in report.skipped) == ["cat/broken.jpg", "dog/notes.txt"]
    assert dict(report.skipped)["dog/notes.txt"] == "not a JPEG, PNG or WEBP image"
    stored = [(tmp_path / "packed" / split / "skipped.jsonl").read_text() for split in ("train", "val")]
    assert "broken.jpg" in "".join(stored) and "notes.txt" in "".join(stored)
    assert report.train.meta["skipped"] + report.val.meta["skipped"] == 2
    assert len(lines) == 2 and "skipped, the first: " in "".join(lines)


def test_large_images_are_scaled_down_and_the_index_says_so(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    report = pack_images(str(source), tmp_path / "packed", **{**PACK_OPTIONS, "resize_short_side": 6})
    sample = ShardReader(tmp_path / "packed/train", report.train).read(0)
    assert sorted(sample.members) == ["cls", "jpg"] and image_of(sample).size == (8, 6)
    assert report.train.meta["encoding"] == "JPEG quality 95, short side at most 6 pixels"


def test_a_file_is_stored_under_what_it_is_not_what_it_is_called(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    for path in source.rglob("*.png"):
        path.rename(path.with_suffix(".JPEG"))
    report = pack_images(str(source), tmp_path / "packed", **PACK_OPTIONS)
    assert "png" in ShardReader(tmp_path / "packed/train", report.train).read(0).members


def test_a_source_of_unreadable_images_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "images/cat").mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"images/cat/{name}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="no readable images for train, the first: cat/.*: not a JPEG, PNG or WEBP"):
        pack_images(str(tmp_path / "images"), tmp_path / "packed", **PACK_OPTIONS)
    assert not is_packed(tmp_path / "packed")


def test_packed_images_are_not_overwritten(tmp_path: Path) -> None:
    source = str(make_folder(tmp_path / "images"))
    pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    with pytest.raises(ValueError, match="already packed; delete it or choose another"):
        pack_images(source, tmp_path / "packed", **PACK_OPTIONS)


def test_an_interrupted_packing_is_simply_repeated(tmp_path: Path) -> None:
    source = str(make_folder(tmp_path / "images"))
    first = pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    (tmp_path / "packed/val/index.json").unlink()
    assert not is_packed(tmp_path / "packed")
    assert pack_images(source, tmp_path / "packed", **PACK_OPTIONS) == first
