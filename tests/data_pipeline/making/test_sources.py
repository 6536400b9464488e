"""Sources: every visible file comes once with its class, and is in train or in val, the same way every time."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tiny import PACK_OPTIONS

from data_pipeline.images.decoding import image_of, label_of
from data_pipeline.making.packing import is_packed, pack_images
from data_pipeline.making.sources import ALL, ImageFile, ImageSource, SourceChanged, open_source, split_by_class
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import MAX_MEMBER_BYTES


def make_files(root: Path, *names: str) -> Path:
    """Files that hold their own name: sources do not decode."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def open_folder(root: Path) -> ImageSource:
    return open_source(str(root), val_fraction=0.5, seed=0, digits_side=8)


def numbered(*sizes: int) -> list[ImageFile]:
    return [ImageFile(f"{label}/{number}", label) for label, size in enumerate(sizes) for number in range(size)]


@pytest.mark.parametrize("val_fraction", [0.01, 0.25, 0.99])
def test_every_file_is_in_one_split_and_every_class_in_train(val_fraction: float) -> None:
    files = numbered(1, 2, 7, 40)
    splits = split_by_class(files, val_fraction=val_fraction, seed=0)
    assert sorted(splits["train"] + splits["val"], key=files.index) == files
    assert {file.label for file in splits["train"]} == {0, 1, 2, 3}
    assert {file.label for file in splits["val"]} == {1, 2, 3}  # the only image of class 0 is needed for training


def test_the_held_out_files_of_a_class_depend_on_the_seed_and_not_on_other_classes() -> None:
    def held_out(*sizes: int, seed: int) -> list[ImageFile]:
        split = split_by_class(numbered(*sizes), val_fraction=0.25, seed=seed)
        return [file for file in split["val"] if file.label == 1]

    assert held_out(4, 40, seed=0) == held_out(9, 40, 5, seed=0) != held_out(4, 40, seed=1)
    assert len(held_out(4, 40, seed=0)) == 10


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(val_fraction: float) -> None:
    with pytest.raises(ValueError, match="expected more than 0 and less than 1"):
        split_by_class(numbered(4), val_fraction=val_fraction, seed=0)


def test_hidden_files_and_folders_are_left_out_and_nested_ones_found(tmp_path: Path) -> None:
    names = ("dog/a", "dog/deep/b", "dog/.x/y", "cat/.hidden", "cat/c", ".git/d", "readme")
    source = open_folder(make_files(tmp_path, *names))
    assert source.classes == ("cat", "dog")
    found = [file for split in source.splits.values() for file in split]
    assert {file.name: file.label for file in found} == {"cat/c": 0, "dog/a": 1, "dog/deep/b": 1}
    assert all(source.read(file).decode() == file.name and file.num_bytes == len(file.name) for file in found)
    assert source.unused == ("readme",) and source.num_hidden == 3  # named and counted, since they are not packed


def test_val_has_the_class_numbers_of_train(tmp_path: Path) -> None:
    source = open_folder(make_files(tmp_path, "train/cat/a", "train/dog/b", "val/dog/c"))
    assert source.splits["val"] == [ImageFile("val/dog/c", 1, num_bytes=len("val/dog/c"))]


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_alone_is_not_taken_for_a_class(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match=f"has {split}/ but not both splits"):
        open_folder(make_files(tmp_path, f"{split}/cat/a"))


def test_a_file_too_large_for_a_shard_is_refused_unread(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/a", "cat/b")
    with (tmp_path / "cat/a").open("wb") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ValueError, match=f"{MAX_MEMBER_BYTES + 1} bytes, at most"):
        read(tmp_path, "cat/a")


def files_of(source: ImageSource) -> dict[str, ImageFile]:
    return {file.name: file for split in source.splits.values() for file in split}


def read(root: Path, name: str) -> bytes:
    source = open_folder(root)
    return source.read(files_of(source)[name])


def test_links_lead_to_regular_files_and_nothing_else_and_nothing_waits(tmp_path: Path) -> None:
    make_files(tmp_path / "source", "cat/a", "cat/b")
    make_files(tmp_path / "elsewhere", "dog/c", "d")
    cat = tmp_path / "source/cat"
    (cat / "link").symlink_to(tmp_path / "elsewhere/d")
    (cat / "dangling").symlink_to("nowhere")
    (cat / "circle").symlink_to("circle")
    (cat / "folder").symlink_to(cat)
    (cat / "null").symlink_to("/dev/null")
    os.mkfifo(cat / "pipe")
    (tmp_path / "source/dog").symlink_to(tmp_path / "elsewhere/dog")  # a class of another data set
    source = open_folder(tmp_path / "source")
    found = files_of(source)
    assert source.read(found["cat/link"]) == b"d" and source.read(found["dog/c"]) == b"dog/c"
    faults = {name: file.fault for name, file in found.items() if file.fault}
    assert faults == {
        "cat/dangling": "a link to nothing",
        "cat/circle": "Too many levels of symbolic links",
        "cat/folder": "a link to a folder",
        "cat/null": "not a regular file",
        "cat/pipe": "not a regular file",
    }
    for name, fault in faults.items():
        with pytest.raises(ValueError, match=fault):
            source.read(found[name])


@pytest.mark.parametrize("change", ["other", "shrunk", "gone", "pipe"])
def test_a_file_that_changes_after_it_was_listed_is_not_taken_for_the_same(tmp_path: Path, change: str) -> None:
    source = open_folder(make_files(tmp_path, "cat/a", "cat/b"))
    path = tmp_path / "cat/a"
    if change in ("gone", "pipe"):
        path.unlink()
        if change == "pipe":
            os.mkfifo(path)
    else:
        path.write_text("" if change == "shrunk" else "another text")
    with pytest.raises(SourceChanged, match="cat/a: (changed|vanished) while it was packed; put it back"):
        source.read(files_of(source)["cat/a"])


def test_the_listing_changes_with_every_name_class_size_and_split(tmp_path: Path) -> None:
    def listing(name: str, *names: str) -> str:
        return open_folder(make_files(tmp_path / name, *names)).listing()

    same = listing("a", "cat/a", "cat/b", "dog/c")
    assert same == listing("b", "cat/a", "cat/b", "dog/c") and same.startswith("3 files of 15 bytes, sha256 ")
    others = [("cat/a", "cat/B", "dog/c"), ("cat/a", "dog/b", "dog/c"), ("cat/a", "cat/b", "dog/c", "dog/d")]
    assert same not in {listing(f"other-{number}", *names) for number, names in enumerate(others)}
    (tmp_path / "a/cat/a").write_text("larger")
    assert open_folder(tmp_path / "a").listing() != same


ODD_NAMES = [
    "a b",
    "quote's",
    'double"',
    "new\nline",
    "日本語",
    "ü",
    "tab\t",
    "-rf",
    "$(x)",
    "%s{0}",
    "x" * 255,
    "\udcff",
]


def test_names_may_hold_anything_that_a_file_system_takes(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("content")
        (tmp_path / name / f"{name[:200]}.2").write_text("content")
    source = open_folder(tmp_path)
    assert set(source.classes) == {*ODD_NAMES} - {"\udcff"} | {"\\xff"}  # classes are shown in many places: UTF-8 only
    assert len(files_of(source)) == 2 * len(ODD_NAMES)
    assert {source.read(file) for file in files_of(source).values()} == {b"content"}


def test_class_names_that_would_read_the_same_are_refused(tmp_path: Path) -> None:
    for name in ("\udcff", "\\xff"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("content")
    with pytest.raises(ValueError, match="two class folders have names that read"):
        open_folder(tmp_path)


def test_digits_at_their_own_size_are_the_originals() -> None:
    from sklearn.datasets import load_digits

    source, digits = open_source("digits", val_fraction=0.5, seed=0, digits_side=8), load_digits()
    for number in (0, 1796):
        with Image.open(io.BytesIO(source.read(ImageFile(f"digit-{number:04d}.png", 0)))) as image:
            grey = [round(level * 16 / 255) for level in image.convert("L").tobytes()]
        assert grey == digits.images[number].ravel().tolist()
    with pytest.raises(ValueError, match="digits_side is 7, expected at least 8"):
        open_source("digits", val_fraction=0.5, seed=0, digits_side=7)


def test_digits_are_split_by_class_and_the_same_every_time(tmp_path: Path) -> None:
    options = {**PACK_OPTIONS, "samples_per_shard": 1000, "val_fraction": 0.1}
    first = pack_images("digits", tmp_path / "a", **options)
    second = pack_images("digits", tmp_path / "b", **options)
    assert first.train.fingerprint == second.train.fingerprint and first.val.fingerprint == second.val.fingerprint
    assert first.train.num_samples + first.val.num_samples == 1797
    reader = ShardReader(tmp_path / "a/val", first.val)
    counts = Counter(label_of(reader.read(i)) for i in range(len(reader)))
    assert sorted(counts) == list(range(10)) and set(counts.values()) <= {17, 18}
    assert image_of(reader.read(0)).size == (16, 16)


@pytest.mark.parametrize(
    "folders, error, reason",
    [
        ([], FileNotFoundError, "no such folder; give a folder of class folders, or 'digits'"),
        ([""], ValueError, "no class folders; expected one folder of images for each class"),
        (["cat"], ValueError, "class folders are empty; put JPEG, PNG or WEBP images there"),
        (["train", "val"], ValueError, "no class folders"),
        (["train/cat", "val/dog"], ValueError, "val has classes that train does not have: dog"),
    ],
)
def test_sources_without_images_are_one_line_errors(
    tmp_path: Path, folders: list[str], error: type[Exception], reason: str
) -> None:
    for folder in folders:
        (tmp_path / "images" / folder).mkdir(parents=True)
    with pytest.raises(error, match=reason) as caught:
        pack_images(str(tmp_path / "images"), tmp_path / "packed", **PACK_OPTIONS)
    assert "\n" not in str(caught.value) and not is_packed(tmp_path / "packed")


def test_pictures_without_classes_are_all_of_one(tmp_path: Path) -> None:
    root = make_files(tmp_path / "flat", "a.jpg", "b.jpg", "more/c.jpg", "more/deep/d.jpg")
    found = open_source(str(root), val_fraction=0.25, seed=0, digits_side=8, labels=False)
    assert found.classes == (ALL,) and found.unused == ()
    names = [file.name for files in found.splits.values() for file in files]
    assert sorted(names) == ["a.jpg", "b.jpg", "more/c.jpg", "more/deep/d.jpg"] and len(found.splits["val"]) == 1
    split = make_files(tmp_path / "split", "train/a.jpg", "train/x/b.jpg", "val/c.jpg")
    found = open_source(str(split), val_fraction=0.0, seed=0, digits_side=8, labels=False)
    assert [[file.name for file in files] for files in found.splits.values()] == [
        ["train/a.jpg", "train/x/b.jpg"],
        ["val/c.jpg"],
    ]
    with pytest.raises(ValueError, match="no class folders; .* or labels=false for pictures without classes"):
        open_source(str(make_files(tmp_path / "pictures", "a.jpg")), val_fraction=0.5, seed=0, digits_side=8)
