"""Folders of pictures, a folder a class, as packing takes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    """Return the file of a picture, or of its pixels (H, W, 3)."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format=format, **options)
    return buffer.getvalue()


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), num_images: int = 8) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(num_images):
            (root / name / f"image.v{number}.png").write_bytes(encoded(noise(9, 12, seed=100 * label + number)))
    return root
