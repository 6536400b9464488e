"""Where images come from before packing: a folder of class folders, one with train/ and val/, or the digits.

Here files are found, given a class, and divided into train and val. Nothing is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.plan import Stream, permutation
from data_pipeline.shards import MAX_MEMBER_BYTES

SPLITS = ("train", "val")
DIGITS = "digits"


@dataclass(frozen=True)
class ImageFile:
    """One image before packing: its name within the source, and its class."""

    name: str
    label: int


@dataclass(frozen=True)
class ImageSource:
    """Class names, the files of each split, and how to get the bytes of one by name."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    read: Callable[[str], bytes]


def open_source(source: str, *, val_fraction: float, seed: int, digits_side: int) -> ImageSource:
    """Find the images of `source`: "digits", a folder with train/ and val/, or a folder of class folders.

    A folder that is itself called digits is given as "./digits".

    Raises FileNotFoundError if there is no such folder, ValueError if it does not hold images by class.
    """
    if source == DIGITS:
        return _digits(side=digits_side, val_fraction=val_fraction, seed=seed)
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give a folder of class folders, or '{DIGITS}'")
    given = [split for split in SPLITS if (root / split).is_dir()]
    if len(given) == 1:
        raise ValueError(f"{source}: has {given[0]}/ but not both splits; add the other, or give {source}/{given[0]}")
    if given:
        return _folder_with_splits(root)
    classes = _class_names(root)
    splits = split_by_class(_files_by_class(root, root, classes), val_fraction=val_fraction, seed=seed)
    return ImageSource(source, classes, splits, read=_reader(root))


def split_by_class(files: list[ImageFile], *, val_fraction: float, seed: int) -> dict[str, list[ImageFile]]:
    """Hold out the same share of every class, at least one image of each class with two or more."""
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}, expected more than 0 and less than 1")
    by_class: dict[int, list[ImageFile]] = {}
    for file in files:
        by_class.setdefault(file.label, []).append(file)
    splits: dict[str, list[ImageFile]] = {split: [] for split in SPLITS}
    for label, members in by_class.items():
        num_val = min(max(1, round(len(members) * val_fraction)), len(members) - 1)
        order = permutation(len(members), seed, Stream.SPLIT, label)
        splits["val"] += [members[i] for i in order[:num_val]]
        splits["train"] += [members[i] for i in order[num_val:]]
    return splits


def _folder_with_splits(root: Path) -> ImageSource:
    names = {split: _class_names(root / split) for split in SPLITS}
    unknown = sorted(set(names["val"]) - set(names["train"]))
    if unknown:
        raise ValueError(f"{root}: val has classes that train does not have: {', '.join(unknown[:5])}")
    splits = {split: _files_by_class(root, root / split, names["train"]) for split in SPLITS}
    return ImageSource(str(root), names["train"], splits, read=_reader(root))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no class folders; expected one folder of images for each class")
    return tuple(names)


def _files_by_class(root: Path, folder: Path, classes: tuple[str, ...]) -> list[ImageFile]:
    """All visible files below the class folders, named relative to `root`, in a fixed order."""
    files = []
    for label, name in enumerate(classes):
        paths = (path for path in (folder / name).rglob("*") if path.is_file() and not path.name.startswith("."))
        files += [ImageFile(path.relative_to(root).as_posix(), label) for path in sorted(paths)]
    if not files:
        raise ValueError(f"{folder}: the class folders are empty; put JPEG, PNG or WEBP images into them")
    return files


def _reader(root: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        num_bytes = (root / name).stat().st_size
        if num_bytes > MAX_MEMBER_BYTES:
            raise ValueError(f"{num_bytes} bytes, at most {MAX_MEMBER_BYTES} are accepted")
        return (root / name).read_bytes()

    return read


def _digits(*, side: int, val_fraction: float, seed: int) -> ImageSource:
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn (UCI ML repository), shown at `side`."""
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    if side < 8:
        raise ValueError(f"digits_side is {side}, expected at least 8, the size of the originals")
    digits = load_digits()
    files = [ImageFile(f"digit-{number:04d}.png", int(label)) for number, label in enumerate(digits.target)]
    pngs = {file.name: _digit_png(grey, side) for file, grey in zip(files, digits.images)}
    splits = split_by_class(files, val_fraction=val_fraction, seed=seed)
    return ImageSource(DIGITS, tuple(str(name) for name in digits.target_names), splits, read=pngs.__getitem__)


def _digit_png(grey: np.ndarray, side: int) -> bytes:
    """grey: (8, 8) with values 0 .. 16 -> an RGB PNG of side x side pixels."""
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
