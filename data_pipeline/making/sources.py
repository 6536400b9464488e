"""Find the images to be packed: in a folder of class folders, one with train/ and val/, or the digits.

Here files are found, given a class, and divided into train and val. Nothing is decoded. Every visible file below the
class folders is listed, also what can be no image: packing names it with its reason, so that nothing goes silently.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.files.hashing import permutation
from data_pipeline.images.decoding import MAX_LABEL
from data_pipeline.loading.plan import Stream
from data_pipeline.shards.members import MAX_MEMBER_BYTES

SPLITS = ("train", "val")
DIGITS = "digits"
ALL = "(no class)"  # of pictures that have none; no folder is called so
UNREADABLE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)  # of a file, whatever the storage does


class SourceChanged(OSError):
    """The error for a file that is no longer what it was when the source was listed."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """The facts about one file before packing. name: within the source. fault: why it cannot be read, or ""."""

    name: str
    label: int
    num_bytes: int = 0
    fault: str = ""


@dataclass(frozen=True)
class ImageSource:
    """The class names of a source, the files of each split, and the way to get the bytes of one.

    read: raises ValueError if a file cannot be read, SourceChanged if it is not the one that was listed.
    unused: visible files and folders beside the class folders, which have no class. num_hidden: names with a dot first.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, list[ImageFile]]
    read: Callable[[ImageFile], bytes]
    unused: tuple[str, ...] = ()
    num_hidden: int = 0

    def listing(self) -> str:
        """Sum up the source in a line that changes with any name, class, size or split."""
        digest = hashlib.sha256()
        for split, files in self.splits.items():
            for file in files:
                digest.update(f"{split} {file.label} {file.num_bytes} {file.fault} ".encode())
                digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0")
        sizes = [file.num_bytes for files in self.splits.values() for file in files]
        return f"{len(sizes)} files of {sum(sizes)} bytes, sha256 {digest.hexdigest()}"


def open_source(source: str, *, val_fraction: float, seed: int, digits_side: int, labels: bool = True) -> ImageSource:
    """Find the images of `source`: "digits", a folder with train/ and val/, or a folder of class folders.

    A folder that is itself called digits is given as "./digits". labels: whether folders are classes; without, all
    pictures below are of the one class ALL.

    Raises FileNotFoundError if there is no such folder, ValueError if it does not hold images by class.
    """
    if source == DIGITS:
        if not labels:
            raise ValueError(f"labels is false, but {DIGITS} have classes; leave it out")
        return _digits(side=digits_side, val_fraction=val_fraction, seed=seed)
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; give a folder of class folders, or '{DIGITS}'")
    given = [split for split in SPLITS if (root / split).is_dir()]
    if len(given) == 1:
        raise ValueError(f"{source}: has {given[0]}/ but not both splits; add the other, or give {source}/{given[0]}")
    tree = _Tree(root, labels)
    if not given:
        classes = tree.class_names("")
        splits = split_by_class(tree.files_by_class("", classes), val_fraction=val_fraction, seed=seed)
        return tree.source(classes, splits)
    tree.unused += [entry.name for entry in tree.visible("") if entry.name not in SPLITS]
    names = {split: tree.class_names(f"{split}/") for split in SPLITS}
    if unknown := sorted(set(names["val"]) - set(names["train"])):
        shown = ", ".join(map(readable_name, unknown[:5]))
        raise ValueError(f"{root}: val has classes that train does not have: {shown}")
    return tree.source(names["train"], {split: tree.files_by_class(f"{split}/", names["train"]) for split in SPLITS})


def split_by_class(files: list[ImageFile], *, val_fraction: float, seed: int) -> dict[str, list[ImageFile]]:
    """Hold out the same share of every class, at least one image of each class with two or more."""
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(
            f"val_fraction is {val_fraction}, expected more than 0 and less than 1; a source without train/ and val/ "
            "of its own needs it: val_fraction=0.05 holds out every twentieth picture"
        )
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


@dataclass
class _Tree:
    """The walk through a folder on disk, with the names in it that are no image of a class."""

    root: Path
    has_classes: bool
    unused: list[str] = field(default_factory=list)
    num_hidden: int = 0

    def source(self, classes: tuple[str, ...], splits: dict[str, list[ImageFile]]) -> ImageSource:
        shown = tuple(map(readable_name, classes)) if self.has_classes else (ALL,)
        if len(set(shown)) != len(shown):
            twice = next(name for name in shown if shown.count(name) > 1)
            raise ValueError(f"{self.root}: two class folders have names that read {twice!r}; rename one")
        return ImageSource(str(self.root), shown, splits, self._read, tuple(sorted(self.unused)), self.num_hidden)

    def class_names(self, folder: str) -> tuple[str, ...]:
        """List the visible folders in a folder; they may be links, where a data set is a choice of another.

        Without classes the folder itself, by no name, is the only one.
        """
        if not self.has_classes:
            return ("",)
        names = []
        for entry in self.visible(folder):
            if entry.is_dir():
                names.append(entry.name)
            else:
                self.unused.append(f"{folder}{entry.name}")
        if not names:
            raise ValueError(
                f"{self.root / folder}: no class folders; expected one folder of images for each class, or "
                "labels=false for pictures without classes"
            )
        if len(names) > MAX_LABEL + 1:
            raise ValueError(f"{self.root / folder}: {len(names)} class folders, at most {MAX_LABEL + 1} are accepted")
        return tuple(sorted(names))

    def files_by_class(self, folder: str, classes: tuple[str, ...]) -> list[ImageFile]:
        """List all visible files below the class folders, named relative to the root, in a fixed order."""
        files: list[ImageFile] = []
        for label, name in enumerate(classes):
            if not (self.root / folder / name).is_dir():
                continue  # val may lack a class of train
            inside = f"{folder}{name}/" if name else folder
            files += sorted(self._files_below(inside, label), key=lambda file: file.name.split("/"))
        if not files:
            what = "the class folders are empty" if self.has_classes else "there are no files"
            raise ValueError(f"{self.root / folder}: {what}; put JPEG, PNG or WEBP images there")
        return files

    def _files_below(self, folder: str, label: int) -> Iterator[ImageFile]:
        folders = [folder]
        while folders:
            inside = folders.pop()
            for entry in self.visible(inside):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inside}{entry.name}/")
                else:
                    yield ImageFile(f"{inside}{entry.name}", label, *_size_and_fault(entry))

    def visible(self, folder: str) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    self.num_hidden += 1
                else:
                    yield entry

    def _read(self, file: ImageFile) -> bytes:
        if file.fault:
            raise ValueError(file.fault)
        if file.num_bytes > MAX_MEMBER_BYTES:
            raise ValueError(f"{file.num_bytes} bytes, at most {MAX_MEMBER_BYTES} are accepted")
        path = self.root / file.name
        try:
            # Another file may be there by now: opening must not wait, as it would for the other end of a pipe.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
                found = os.fstat(opened.fileno())
                content = opened.read(file.num_bytes + 1) if stat.S_ISREG(found.st_mode) else b""
        except FileNotFoundError as error:
            raise SourceChanged(f"{path}: vanished while it was packed; put it back, or start anew") from error
        except OSError as error:
            if error.errno not in UNREADABLE:  # the storage fails: no fault of the file, and not so tomorrow
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise ValueError(error.strerror) from error
        if len(content) != file.num_bytes:
            raise SourceChanged(f"{path}: changed while it was packed; put it back as it was, or start anew")
        return content


def _size_and_fault(entry: os.DirEntry[str]) -> tuple[int, str]:
    """Return the bytes of a file, and why it cannot be read, if so; links are followed to files alone."""
    try:
        found = entry.stat()
    except FileNotFoundError:
        return 0, "a link to nothing"
    except OSError as error:
        return 0, str(error.strerror)
    if stat.S_ISREG(found.st_mode):
        return found.st_size, ""
    return 0, "a link to a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"


def readable_name(name: str) -> str:
    """Write a file name so that it can be stored anywhere: bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _digits(*, side: int, val_fraction: float, seed: int) -> ImageSource:
    """Offer the 1,797 handwritten digits of 8 x 8 pixels of scikit-learn (UCI ML repository), scaled to `side`."""
    from sklearn.datasets import load_digits  # only this source needs scikit-learn

    if side < 8:
        raise ValueError(f"digits_side is {side}, expected at least 8, the size of the originals")
    digits = load_digits()
    pngs = {f"digit-{number:04d}.png": _digit_png(grey, side) for number, grey in enumerate(digits.images)}
    files = [ImageFile(name, int(label), len(png)) for (name, png), label in zip(pngs.items(), digits.target)]
    splits = split_by_class(files, val_fraction=val_fraction, seed=seed)
    return ImageSource(DIGITS, tuple(str(name) for name in digits.target_names), splits, lambda file: pngs[file.name])


def _digit_png(grey: np.ndarray, side: int) -> bytes:
    """Make an RGB PNG of side x side pixels of grey (8, 8) with values 0 .. 16."""
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    image = image.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
