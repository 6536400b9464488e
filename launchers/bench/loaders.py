"""The loaders that `benchmark.py data` sets beside ours: what people use on the same pictures, with the same transform.

Each ends where ours ends: batches of float32 in [-1, 1], short side 288, a random crop of 256, and labels.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.images.decoding import ImageTransform, resize_short_side

BATCH = 64
TRANSFORM = ImageTransform(image_size=256)
SHUFFLED = 1000  # samples in webdataset's buffer


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Files in folders of classes, decoded by Pillow, as torchvision's class of this name does."""

    def __init__(self, folder: Path, *, passes: int = 1) -> None:
        """passes: how often each file comes."""
        self.files = sorted(folder.glob("*/*")) * passes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path = self.files[number]
        with open(path, "rb") as file:
            return random_crop(Image.open(file).convert("RGB")), int(path.parent.name)


def random_crop(image: Image.Image) -> Tensor:
    image = resize_short_side(image, TRANSFORM.short_side)
    left, top = (random.randint(0, side - TRANSFORM.image_size) for side in image.size)
    view = image.crop((left, top, left + TRANSFORM.image_size, top + TRANSFORM.image_size))
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).mul_(2).sub_(1)


def decoded(sample: tuple[bytes, bytes]) -> tuple[Tensor, int]:
    content, label = sample
    return random_crop(Image.open(io.BytesIO(content)).convert("RGB")), int(label)


def read_folder(dataset: Dataset[tuple[Tensor, int]], *, workers: int) -> int:
    """All files in random order by PyTorch's DataLoader."""
    return sum(len(labels) for _, labels in DataLoader(dataset, BATCH, shuffle=True, num_workers=workers))


def read_webdataset(shards: list[str], *, workers: int) -> int:
    """All shards by WebDataset, shuffled and decoded as its manual has it."""
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(SHUFFLED)
    samples = samples.to_tuple("jpg;jpeg;png;webp", "cls").map(decoded)
    return sum(len(labels) for _, labels in DataLoader(samples, BATCH, num_workers=workers))


def read_bytes_in_order(shards: list[str]) -> int:
    """Samples as bytes by WebDataset, one after the other, which is the way it is made for."""
    return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False))


@contextmanager
def one_core() -> Iterator[None]:
    """This thread, and those that it starts, on one core: no contestant has more of the machine than another."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(allowed)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def on_one_core(call: Callable[[], int]) -> Callable[[], int]:
    """The call, held to one core."""

    def held() -> int:
        with one_core():
            return call()

    return held


def take(batches: Iterator[Any], number: int, use: Callable[[Any], Any]) -> int:
    """Use so many batches and close what reads ahead; how many samples there were."""
    try:
        return sum(len(use(next(batches)).labels) for _ in range(number))
    finally:
        if hasattr(batches, "close"):
            batches.close()
