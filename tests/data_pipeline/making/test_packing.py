"""Packing loses nothing without saying so: every picture comes back with its class, or is named as left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import encoded, make_folder, noise
from PIL import Image
from tiny import PACK_OPTIONS

from data_pipeline.images.decoding import image_of, label_of
from data_pipeline.making.pack_report import report_lines
from data_pipeline.making.packing import is_packed, pack_images
from data_pipeline.shards.index import Index
from data_pipeline.shards.reader import ShardReader


def skipped(out: Path) -> dict[str, str]:
    """What was left out of both splits, with the reasons."""
    rows = [json.loads(line) for path in out.glob("*/skipped.jsonl") for line in path.read_text().splitlines()]
    return {row["file"]: row["reason"] for row in rows}


def test_a_packed_folder_gives_every_image_back_with_its_class(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    out = tmp_path / "packed"
    assert not is_packed(out)
    report = pack_images(str(source), out, **PACK_OPTIONS)
    assert is_packed(out) and report.train == Index.read(out / "train", kind="images") and not skipped(out)
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
    assert sorted(skipped(tmp_path / "packed")) == ["cat/broken.jpg", "dog/notes.txt"]
    assert skipped(tmp_path / "packed")["dog/notes.txt"] == "not a JPEG, PNG or WEBP image"
    assert report.train.meta["skipped"] + report.val.meta["skipped"] == 2
    assert sum(split["skipped"] for split in report.counts["splits"].values()) == 2
    said = "\n".join(report_lines(report.counts))
    assert "the first: cat/broken.jpg: " in said or "the first: dog/notes.txt: not a JPEG, PNG or WEBP image" in said


def test_large_images_are_scaled_down_and_the_index_says_so(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    report = pack_images(str(source), tmp_path / "packed", **{**PACK_OPTIONS, "resize_short_side": 6})
    sample = ShardReader(tmp_path / "packed/train", report.train).read(0)
    assert sorted(sample.members) == ["cls", "jpg"] and image_of(sample).size == (8, 6)
    assert "those with a short side over 6 pixels scaled down, JPEG quality 95" in report.train.meta["encoding"]


def test_images_that_are_no_larger_keep_their_bytes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    pack_images(str(source), tmp_path / "whole", **PACK_OPTIONS)
    pack_images(str(source), tmp_path / "packed", **{**PACK_OPTIONS, "resize_short_side": 9})  # they have 12 x 9
    for shard in (tmp_path / "whole").rglob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "packed" / shard.relative_to(tmp_path / "whole")).read_bytes()


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


def test_packed_images_are_not_packed_again_nor_overwritten(tmp_path: Path) -> None:
    source = str(make_folder(tmp_path / "images"))
    first = pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").rglob("*")}
    assert pack_images(source, tmp_path / "packed", **PACK_OPTIONS) == first  # as by a worker that comes late
    with pytest.raises(ValueError, match="already packed with seed 0, now it is 1; delete it or choose another"):
        pack_images(source, tmp_path / "packed", **{**PACK_OPTIONS, "seed": 1})
    (tmp_path / "images/cat/image.v0.png").unlink()
    with pytest.raises(ValueError, match="already packed with listing 16 files of .*, now it is 15 files of "):
        pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").rglob("*")}


def test_a_shard_is_the_same_stretch_of_the_shuffled_files_whatever_is_unreadable(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images", num_images=20)
    report = pack_images(str(source), tmp_path / "whole", **PACK_OPTIONS)
    rows = files_of(tmp_path / "whole/train")
    assert [int(row["key"]) for row in rows] == list(range(30)) and len(report.train.shards) == 8
    for row in rows[4:9]:  # all of the second shard, and one of the third
        (source / row["file"]).write_bytes(b"no image any more")
    report = pack_images(str(source), tmp_path / "holes", **PACK_OPTIONS)
    assert [shard.name for shard in report.train.shards[:2]] == ["shard-000000.tar", "shard-000002.tar"]
    assert files_of(tmp_path / "holes/train") == rows[:4] + rows[9:]
    reader = ShardReader(tmp_path / "holes/train", report.train)
    assert [reader.read(i).key for i in range(len(reader))] == [row["key"] for row in rows[:4] + rows[9:]]
    for number in (0, 3, 7):
        name = f"train/shard-{number:06d}.tar"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "holes" / name).read_bytes()


def files_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "files.jsonl").read_text().splitlines()]


def odd_photographs(root: Path) -> Path:
    """Pictures whose left half is red and right half blue, taller than wide once upright, in every odd form."""
    (root / "a class, odd\n").mkdir(parents=True)
    pixels = np.zeros((40, 30, 3), np.uint8)
    pixels[:, :15, 0], pixels[:, 15:, 2] = 230, 230
    image = Image.fromarray(pixels)
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned back by 90 degrees
    forms: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.jpg": (image, {"format": "JPEG", "quality": 95}),
        "cmyk.jpg": (image.convert("CMYK"), {"format": "JPEG", "quality": 95}),
        "turned.jpg": (turned, {"format": "JPEG", "exif": exif, "quality": 95}),
        "a png.JPEG": (image, {"format": "PNG"}),
        "palette.png": (image.quantize(8), {"format": "PNG"}),
        "alpha.webp": (image.convert("RGBA"), {"format": "WEBP", "lossless": True}),
        "no suffix \udcff": (image, {"format": "WEBP", "quality": 95}),
        "grey.jpg": (image.convert("L"), {"format": "JPEG"}),
        "bits.png": (image.convert("1"), {"format": "PNG"}),
    }
    for name, (form, options) in forms.items():
        form.save(root / "a class, odd\n" / name, **options)
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    sixteen.save(root / "a class, odd\n/sixteen.png")
    others = {
        "notes.txt": b"not an image",
        "moving.gif": encoded(noise(9, 12), "GIF"),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "empty.jpg": b"",
    }
    for name, data in others.items():
        (root / "a class, odd\n" / name).write_bytes(data)
    os.mkfifo(root / "a class, odd\n/pipe.jpg")
    return root


@pytest.mark.parametrize("resize", [None, 20])
def test_photographs_in_odd_forms_keep_colours_and_orientation_and_the_rest_is_named(
    tmp_path: Path, resize: int | None
) -> None:
    source = odd_photographs(tmp_path / "images")
    report = pack_images(str(source), tmp_path / "packed", **{**PACK_OPTIONS, "resize_short_side": resize})
    names = {name.rsplit("/", 1)[-1]: reason for name, reason in skipped(tmp_path / "packed").items()}
    not_read = "not a JPEG, PNG or WEBP image"
    assert names.pop("pipe.jpg") == "not a regular file" and names.pop("empty.jpg")
    assert set(names.values()) == {not_read}
    assert set(names) == {"notes.txt", "moving.gif", "drawing.svg", "phone.heic"}
    seen = 0
    for split, index in (("train", report.train), ("val", report.val)):
        found = report.counts["splits"][split]
        assert found["listed"] == found["images"] + found["skipped"]
        reader = ShardReader(tmp_path / "packed" / split, index)
        for number, row in enumerate(files_of(tmp_path / "packed" / split)):
            pixels = np.asarray(image_of(reader.read(number))).astype(int)
            assert pixels.shape == ((40, 30, 3) if resize is None else (26, 20, 3)), row
            left, right = pixels[:, :5].mean((0, 1)), pixels[:, -5:].mean((0, 1))
            if any(kind in row["file"] for kind in ("grey", "bits", "sixteen")):
                assert left.std() < 3 and left[0] > right[0] + 10, row  # red is the lighter grey
            else:
                assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0], row
            seen += 1
    assert seen == 10 and found["width"]["max"] == (30 if resize is None else 20)
