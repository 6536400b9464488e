"""Computing on sets of images on several ranks, the same on any number of them.

A rank takes whole units of images and leaves what it computed of each in a file, which rank 0 reads in order.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launchers.setup.command_line import say
from data_pipeline.files.atomic import atomic_file
from launchers.evaluation.images import UNIT, ImageSet
from training.engine.distributed import World, barrier, failing_together, join_world, leave_world

import numpy as np


@contextmanager
def ranks() -> Iterator[World]:
    """Join the ranks that evaluate, if there are several, and leave them at the end."""
    world = World.from_environment()
    if world.world_size > 1:
        world = join_world()
    try:
        yield world
    finally:
        leave_world()


def compute_units(
    images: ImageSet, compute: Callable[[np.ndarray], dict[str, Any]], parts: Path, world: World
) -> Iterator[dict[str, np.ndarray]]:
    """Compute arrays from each unit of a set; yield them in order on rank 0, and nothing on the others. A collective.

    compute: images (n, H, W, 3) uint8 -> arrays by name. parts: a folder on storage that all ranks share; it is emptied
    before and removed after.

    Raises:
        DamagedData, OSError, ValueError: an image or a file cannot be read or written; on all ranks.
    """
    with failing_together(world):
        if world.is_rank_zero:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir(parents=True)
            say(f"{images.count:,} images of {images.side} pixels")
    with failing_together(world):
        for unit, pixels in images.units(world.rank, world.world_size):
            with atomic_file(parts / f"{unit}.npz") as file:
                np.savez(file, **compute(pixels))
    barrier(world)
    if world.is_rank_zero:
        for unit in range(-(-images.count // UNIT)):
            with np.load(parts / f"{unit}.npz") as found:
                yield dict(found)
        shutil.rmtree(parts)
