"""Pictures made of pictures: grids of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] to (N, H, W, 3) uint8, rounded to the nearest level."""
    levels = images.add(1).mul(127.5).round().clamp(0, 255)
    return levels.byte().permute(0, 2, 3, 1).cpu().numpy()


def tile(images: np.ndarray, *, columns: int, gap: int) -> np.ndarray:
    """Images (N, H, W, 3) uint8 as one picture, row by row, white between and around them."""
    number, height, width, _ = images.shape
    rows = -(-number // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(images: np.ndarray, path: Path, *, columns: int, least_side: int = 48, gap: int = 2) -> None:
    """Write images (N, H, W, 3) uint8 as a grid, row by row; small ones are enlarged without smoothing."""
    sheet = tile(images, columns=columns, gap=gap)
    factor = -(-least_side // images.shape[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.repeat(factor, 0).repeat(factor, 1)).save(path)
