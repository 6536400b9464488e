"""The folder that a sampling fills: what it holds is recorded, written unit by unit, and found again after a kill.

    OUT/samples.json          what defines the images
    OUT/png/CLASS/NUMBER.png  format png: one file per image
    OUT/parts/UNIT.npy        format npz: a unit's images, (n, H, W, 3) uint8, until all are there; then
    OUT/samples.npz           all of them, for the ADM evaluator
    OUT/samples.png           a grid of some

Every file appears under its name only when it is complete, so what is there need not be drawn again.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.strict_json import read_json
from launchers.sampling.pictures import save_grid
from launchers.sampling.plan import SamplePlan

import numpy as np
from PIL import Image

RECORD, GRID, NPZ, PARTS = "samples.json", "samples.png", "samples.npz", "parts"
SHUFFLE_SEED = 0  # of the order in samples.npz
MAX_COLUMNS, MAX_ROWS, MAX_GRID_SIDE = 20, 50, 4096  # of the grid; the side in pixels
IMAGES = ("png/*/*.png", f"{PARTS}/*.npy", NPZ)
LEFTOVERS = (".*.tmp-*", f"{PARTS}/.*.tmp-*", "png/*/.*.tmp-*")


class SampleFiles(ABC):
    """The images of a plan in a folder, in one of the two formats."""

    def __init__(self, folder: Path, plan: SamplePlan) -> None:
        self.folder = folder
        self.plan = plan

    @abstractmethod
    def pending(self) -> list[int]:
        """List the units that are not complete."""

    @abstractmethod
    def write(self, unit: int, images: np.ndarray) -> None:
        """Store a unit's images, (n, H, W, 3) uint8."""

    @abstractmethod
    def read(self, image: int) -> np.ndarray:
        """Read one stored image, (H, W, 3) uint8."""

    @abstractmethod
    def commit(self) -> Path:
        """Bring the images into their last form, once no unit is pending, and return where they are."""

    @abstractmethod
    def is_finished(self) -> bool:
        """Tell whether images and grid are there in their last form."""


def open_files(folder: Path, plan: SamplePlan, *, format: str) -> SampleFiles:
    """Open a folder for the images of a plan. format: "png" or "npz"."""
    return PngFiles(folder, plan) if format == "png" else NpzFiles(folder, plan)


class PngFiles(SampleFiles):
    """One file per image, under names of constant length so that they sort."""

    def path(self, image: int) -> Path:
        """Return where an image is stored."""
        label, number = self.plan.classes[image // self.plan.per_class], image % self.plan.per_class
        return self.folder / "png" / f"{label:05d}" / f"{number:07d}.png"

    def pending(self) -> list[int]:
        there = set((self.folder / "png").glob("*/*.png"))
        units = {unit: self.plan.unit(unit).tolist() for unit in range(self.plan.num_units)}
        return [unit for unit, images in units.items() if not all(self.path(image) in there for image in images)]

    def write(self, unit: int, images: np.ndarray) -> None:
        with ThreadPoolExecutor() as writers:  # most of the time goes into waiting for the disk
            list(writers.map(self._write_one, self.plan.unit(unit).tolist(), images))

    def _write_one(self, image: int, pixels: np.ndarray) -> None:
        self.path(image).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path(image)) as file:
            Image.fromarray(pixels).save(file, format="png")

    def read(self, image: int) -> np.ndarray:
        with Image.open(self.path(image)) as picture:
            return np.asarray(picture)

    def commit(self) -> Path:
        return self.folder / "png"

    def is_finished(self) -> bool:
        return (self.folder / GRID).is_file() and not self.pending()


class NpzFiles(SampleFiles):
    """One file of all images, by way of one part per unit."""

    def path(self, unit: int) -> Path:
        """Return where a unit is stored until all are there."""
        return self.folder / PARTS / f"{unit:08d}.npy"

    def pending(self) -> list[int]:
        there = set((self.folder / PARTS).glob("*.npy"))
        units = [] if self.is_finished() else range(self.plan.num_units)
        return [unit for unit in units if self.path(unit) not in there]

    def write(self, unit: int, images: np.ndarray) -> None:
        self.path(unit).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path(unit)) as file:
            np.save(file, images)

    def read(self, image: int) -> np.ndarray:
        """Read from the parts, which are mapped into memory and are there until commit."""
        unit, row = divmod(image, self.plan.batch)
        path, wanted = self.path(unit), len(self.plan.unit(unit))
        try:
            part = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}); remove it and run the same command again") from None
        if len(part) != wanted:
            raise ValueError(f"{path}: holds {len(part)} images instead of {wanted}; remove it and run again")
        return np.asarray(part[row])

    def commit(self) -> Path:
        """Join the parts into samples.npz, then remove them. One image at a time is in memory.

        They are shuffled because evaluators take the inception score of consecutive parts of the file: in class order
        each part would hold few classes.
        """
        if not self.is_finished():
            order = np.random.default_rng(SHUFFLE_SEED).permutation(self.plan.num_images)
            labels = self.plan.labels(order)
            refuse_miscounted(labels, self.plan)
            with atomic_file(self.folder / NPZ) as file:
                write_npz(file, map(self.read, order.tolist()), labels, shape=self.read(0).shape)
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)
        return self.folder / NPZ

    def is_finished(self) -> bool:
        return (self.folder / NPZ).is_file()


def write_npz(file: BinaryIO, images: Iterable[np.ndarray], labels: np.ndarray, *, shape: tuple[int, ...]) -> None:
    """Stream images of one shape (H, W, 3), uint8, into an npz: `arr_0` (N, H, W, 3) and `labels` (N,) int64.

    numpy.savez would need all images in memory.

    Raises:
        ValueError: an image of another shape or type, or not as many images as labels.
    """
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
    written = 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header | {"shape": (len(labels), *shape)})
            for image in images:
                if image.shape != shape or image.dtype != np.uint8:
                    raise ValueError(f"image {written} is {image.dtype} {image.shape}, the others uint8 {shape}")
                member.write(image.tobytes())
                written += 1
        with archive.open(zipfile.ZipInfo("labels.npy"), "w") as member:
            np.lib.format.write_array(member, labels)
    if written != len(labels):
        raise ValueError(f"{written} images for {len(labels)} labels")


def refuse_miscounted(labels: np.ndarray, plan: SamplePlan) -> None:
    """Raise ValueError unless `labels` has exactly `per_class` of every class of the plan and nothing else."""
    found, counts = np.unique(labels, return_counts=True)
    if sorted(plan.classes) != found.tolist() or set(counts.tolist()) != {plan.per_class}:
        raise ValueError(
            f"classes {found.tolist()[:10]} come {sorted(set(counts.tolist()))} times, "
            f"{plan.per_class} of each of {len(plan.classes)} were asked for"
        )


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Record what defines the images in a folder, or check that those in it are the same; clear what was cut off.

    Raises:
        ValueError: its images are of other settings, or not recorded.
    """
    settings = json.loads(json.dumps(settings))
    if any(next(folder.glob(pattern), None) for pattern in IMAGES):
        _refuse_other_settings(folder, settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / RECORD) as file:
            file.write(f"{json.dumps(settings, indent=1)}\n".encode())
    for leftover in [path for pattern in LEFTOVERS for path in folder.glob(pattern)]:
        leftover.unlink()
    if (folder / NPZ).is_file():
        shutil.rmtree(folder / PARTS, ignore_errors=True)


def _refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        recorded = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} {error}; remove {folder} and sample again") from None
    recorded = recorded if isinstance(recorded, dict) else {}
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{folder}: its images have {name} {recorded.get(name, 'unknown')}, this command has {value}; "
                f"change it back, choose another folder with out=PATH, or remove {folder}"
            )


def draw_grid(files: SampleFiles, folder: Path) -> Path:
    """Write a picture of some of the images, which must all be there, and return its path."""
    images, columns = grid_layout(files.plan, image_side=files.read(0).shape[0])
    save_grid(np.stack([files.read(image) for image in images.tolist()]), folder / GRID, columns=columns)
    return folder / GRID


def grid_layout(plan: SamplePlan, *, image_side: int) -> tuple[np.ndarray, int]:
    """Choose the images to show, row by row, and the number of columns.

    A class takes a row; a single class takes a square. image_side: in pixels, on which the number of images depends.
    """
    most = max(1, MAX_GRID_SIDE // image_side)
    columns, rows = min(MAX_COLUMNS, most), min(MAX_ROWS, most)
    if len(plan.classes) == 1:
        columns = min(columns, int(np.ceil(np.sqrt(plan.per_class))))
        return np.arange(min(plan.per_class, rows * columns)), columns
    columns = min(columns, plan.per_class)
    shown = np.arange(min(len(plan.classes), rows))[:, None] * plan.per_class + np.arange(columns)
    return shown.reshape(-1), columns
