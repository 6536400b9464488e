"""Sources: every visible file comes once with its class, and is in train or in val, the same way every time."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tiny import PACK_OPTIONS

from data_pipeline.images import image_of
from data_pipeline.labels import label_of
from data_pipeline.packing import is_packed, pack_images
from data_pipeline.reader import ShardReader
from data_pipeline.shards import MAX_MEMBER_BYTES
from data_pipeline.sources import ImageFile, ImageSource, open_source, split_by_class


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
    source = open_folder(make_files(tmp_path, "dog/a", "dog/deep/b", "cat/.hidden", "cat/c", ".git/d", "readme"))
    assert source.classes == ("cat", "dog")
    found = {file.name: file.label for split in source.splits.values() for file in split}
    assert found == {"cat/c": 0, "dog/a": 1, "dog/deep/b": 1}
    assert all(source.read(name).decode() == name for name in found)


def test_val_has_the_class_numbers_of_train(tmp_path: Path) -> None:
    source = open_folder(make_files(tmp_path, "train/cat/a", "train/dog/b", "val/dog/c"))
    assert source.splits["val"] == [ImageFile("val/dog/c", 1)]


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_alone_is_not_taken_for_a_class(tmp_path: Path, split: str) -> None:
    with pytest.raises(ValueError, match=f"has {split}/ but not both splits"):
        open_folder(make_files(tmp_path, f"{split}/cat/a"))


def test_a_file_too_large_for_a_shard_is_refused_unread(tmp_path: Path) -> None:
    source = open_folder(make_files(tmp_path, "cat/a", "cat/b"))
    with (tmp_path / "cat/a").open("wb") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)  # sparse: takes no room
    with pytest.raises(ValueError, match=f"{MAX_MEMBER_BYTES + 1} bytes, at most"):
        source.read("cat/a")


def test_digits_at_their_own_size_are_the_originals() -> None:
    from sklearn.datasets import load_digits

    source, digits = open_source("digits", val_fraction=0.5, seed=0, digits_side=8), load_digits()
    for number in (0, 1796):
        with Image.open(io.BytesIO(source.read(f"digit-{number:04d}.png"))) as image:
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
        (["cat"], ValueError, "class folders are empty; put JPEG, PNG or WEBP images into them"),
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
