"""Pictures made of pictures: from a model's images to levels of grey, and to grids of samples."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.files.atomic import atomic_file

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn images (N, 3, H, W) in [-1, 1] into (N, H, W, 3) uint8, rounded to the nearest level."""
    levels = images.add(1).mul(127.5).round().clamp(0, 255)
    return levels.byte().permute(0, 2, 3, 1).cpu().numpy()


def tile(images: np.ndarray, *, columns: int, gap: int) -> np.ndarray:
    """Join images (N, H, W, 3) uint8 into one picture, row by row, white between and around them; gap in pixels."""
    total, height, width, _ = images.shape
    rows = -(-total // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = gap + number // columns * (height + gap), gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(images: np.ndarray, path: Path, *, columns: int, least_side: int = 48, gap: int = 2) -> None:
    """Write images (N, H, W, 3) uint8 as a grid in a PNG file, whole or not at all.

    Images below `least_side` pixels are enlarged without smoothing.
    """
    sheet = tile(images, columns=columns, gap=gap)
    factor = -(-least_side // images.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        Image.fromarray(sheet.repeat(factor, 0).repeat(factor, 1)).save(file, format="PNG")
