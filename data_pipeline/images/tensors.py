"""Samples as tensors: narrow while they are read, sent to other processes and to a device, wide where they are used.

A pixel is one byte and a code two; the float32 and int64 that models take are four times as much to move. `widen` makes
them, on the device that the data has reached. Legend: B batch, L codes of one image, S image size.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8, whose channels stay neighbours in memory, as the decoder leaves them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stack_pixels(images: Iterable[Image.Image], *, number: int, side: int) -> Tensor:
    """So many RGB images (side, side), taken one by one, as (B, 3, S, S) uint8 in the memory order of `pixels_of`."""
    pixels = np.empty((number, side, side, 3), dtype=np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[:] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def floats_of(pixels: Tensor) -> Tensor:
    """Pixels (3, H, W) or (B, 3, H, W) uint8 as contiguous float32 in [-1, 1]: the same bits on every device."""
    if pixels.device.type == "cpu":
        return _floats_on_the_host(pixels)
    wide = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # By a tensor on the device, since CUDA divides by a number of the host by multiplying with its rounded inverse.
    return wide.div_(torch.full((), 255.0, device=pixels.device)).mul_(2).sub_(1)


def widen(data: Tensor) -> Tensor:
    """What models take: of pixels (B, 3, S, S) uint8 float32 in [-1, 1], of codes (B, L) of any width int64."""
    return floats_of(data) if data.ndim == 4 else data.to(torch.int64)


def _floats_on_the_host(pixels: Tensor) -> Tensor:
    # NumPy asks the kernel for huge pages: to touch a new batch in small ones takes longer than to fill it. It works in
    # this thread alone, image by image within the cache, while data workers have the other cores.
    wide = np.empty(tuple(pixels.shape), dtype=np.float32)
    narrow = pixels.numpy()
    for image, source in zip(wide, narrow) if wide.ndim == 4 else [(wide, narrow)]:
        image[...] = source
        image /= np.float32(255)
        image *= 2
        image -= 1
    return torch.from_numpy(wide)
