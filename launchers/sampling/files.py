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
import os
import shutil
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.strict_json import read_json
from launchers.sampling.pictures import save_grid
from launchers.sampling.plan import SamplePlan

RECORD, GRID, NPZ, PARTS = "samples.json", "samples.png", "samples.npz", "parts"
SHUFFLE_SEED = 0  # of the order in samples.npz
MAX_COLUMNS, MAX_ROWS, MAX_GRID_SIDE = 20, 50, 4096  # of the grid; the side in pixels
IMAGES = ("png/*/*.png", f"{PARTS}/*.npy", NPZ)
LEFTOVERS = (".*.tmp-*", f"{PARTS}/.*.tmp-*", "png/*/.*.tmp-*")


class SampleFiles(Protocol):
    """The images of a plan on disk, in one of the two formats."""

    def pending(self) -> list[int]:
        """The units that are not complete."""

    def write(self, unit: int, images: np.ndarray) -> None:
        """Store a unit's images, (n, H, W, 3) uint8."""

    def read(self, image: int) -> np.ndarray:
        """One stored image, (H, W, 3) uint8."""

    def commit(self) -> Path:
        """Finish, once no unit is pending; where the images are."""

    def is_finished(self) -> bool:
        """Whether images and grid are there in their last form."""


def open_files(folder: Path, plan: SamplePlan, *, format: str) -> SampleFiles:
    return PngFiles(folder, plan) if format == "png" else NpzFiles(folder, plan)


class PngFiles:
    """One file per image, under names of constant length so that they sort."""

    def __init__(self, folder: Path, plan: SamplePlan) -> None:
        self.root = folder / "png"
        self.plan = plan

    def path(self, image: int) -> Path:
        label, number = self.plan.classes[image // self.plan.per_class], image % self.plan.per_class
        return self.root / f"{label:05d}" / f"{number:07d}.png"

    def pending(self) -> list[int]:
        there = {path.name: _names(path) for path in self.root.iterdir()} if self.root.is_dir() else {}
        paths = {unit: map(self.path, self.plan.unit(unit).tolist()) for unit in range(self.plan.num_units)}
        return [unit for unit in paths if not all(path.name in there.get(path.parent.name, ()) for path in paths[unit])]

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
        return self.root

    def is_finished(self) -> bool:
        return (self.root.parent / GRID).is_file() and not self.pending()


class NpzFiles:
    """samples.npz, by way of one part per unit."""

    def __init__(self, folder: Path, plan: SamplePlan) -> None:
        self.root = folder / PARTS
        self.final = folder / NPZ
        self.plan = plan

    def path(self, unit: int) -> Path:
        return self.root / f"{unit:08d}.npy"

    def pending(self) -> list[int]:
        if self.is_finished():
            return []
        there = _names(self.root)
        return [unit for unit in range(self.plan.num_units) if self.path(unit).name not in there]

    def write(self, unit: int, images: np.ndarray) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path(unit)) as file:
            np.save(file, images)

    def read(self, image: int) -> np.ndarray:
        """From the parts, mapped into memory; they are there until commit."""
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
            with atomic_file(self.final) as file:
                write_npz(file, map(self.read, order.tolist()), labels, shape=self.read(0).shape)
        shutil.rmtree(self.root, ignore_errors=True)
        return self.final

    def is_finished(self) -> bool:
        return self.final.is_file()


def write_npz(file: BinaryIO, images: Iterable[np.ndarray], labels: np.ndarray, *, shape: tuple[int, ...]) -> None:
    """Stream images of one shape (H, W, 3), uint8, into an npz: `arr_0` (N, H, W, 3) and `labels` (N,) int64.

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
    """Record what defines the images in `folder`, or make sure that those in it are the same. Clear what was cut off.

    Raises:
        ValueError: its images are of other settings, or not recorded.
    """
    record = folder / RECORD
    settings = json.loads(json.dumps(settings))
    if any(next(folder.glob(pattern), None) for pattern in IMAGES):
        _refuse_other_settings(folder, _read_record(record), settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(record) as file:
            file.write(f"{json.dumps(settings, indent=1)}\n".encode())
    for pattern in LEFTOVERS:
        for leftover in folder.glob(pattern):
            leftover.unlink()
    if (folder / NPZ).is_file():
        shutil.rmtree(folder / PARTS, ignore_errors=True)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        recorded = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} {error}; remove {path.parent} and sample again") from None
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} holds a {type(recorded).__name__}; remove {path.parent} and sample again")
    return recorded


def _refuse_other_settings(folder: Path, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{folder}: its images have {name} {recorded.get(name, 'unknown')}, this command has {value}; "
                f"change it back, choose another folder with out=PATH, or remove {folder}"
            )


def draw_grid(files: SampleFiles, plan: SamplePlan, folder: Path) -> Path:
    """Write a picture of some of the images, which must all be there; its path."""
    images, columns = grid_layout(plan, image_side=files.read(0).shape[0])
    temporary = folder / f".{GRID}.tmp-{os.getpid()}.png"
    save_grid(np.stack([files.read(image) for image in images.tolist()]), temporary, columns=columns)
    os.replace(temporary, folder / GRID)
    return folder / GRID


def grid_layout(plan: SamplePlan, *, image_side: int) -> tuple[np.ndarray, int]:
    """The images to show, row by row, and the number of columns: a class per row, or a square of a single class."""
    most = max(1, MAX_GRID_SIDE // image_side)
    columns, rows = min(MAX_COLUMNS, most), min(MAX_ROWS, most)
    if len(plan.classes) == 1:
        columns = min(columns, int(np.ceil(np.sqrt(plan.per_class))))
        return np.arange(min(plan.per_class, rows * columns)), columns
    columns = min(columns, plan.per_class)
    shown = np.arange(min(len(plan.classes), rows))[:, None] * plan.per_class + np.arange(columns)
    return shown.reshape(-1), columns


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
