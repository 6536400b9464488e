"""Samples as tensors: narrow while they are read and moved, wide where they are used.

A pixel is one byte and a code two; the float32 and int64 that models take are four times as much to move between
processes and to a device. `widen` makes them on the device. Legend: B batch, L codes of one image, S image size.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixels_of(image: Image.Image) -> Tensor:
    """View an RGB image as (3, H, W) uint8; the channels stay neighbours in memory, as the decoder leaves them."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stack_pixels(images: Iterable[Image.Image], *, number: int, side: int) -> Tensor:
    """Stack RGB images of one size, taken one by one, to (B, 3, S, S) uint8 in the memory order of `pixels_of`.

    number: how many images there are. side: S.
    """
    pixels = np.empty((number, side, side, 3), dtype=np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[:] = np.asarray(image)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def floats_of(pixels: Tensor) -> Tensor:
    """Make uint8 pixels (..., 3, H, W) contiguous float32 in [-1, 1], with the same bits on every device."""
    if pixels.device.type == "cpu":
        return _floats_on_the_host(pixels)
    wide = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    # Divide by a tensor on the device: CUDA divides by a number of the host by multiplying with its rounded inverse.
    return wide.div_(torch.full((), 255.0, device=pixels.device)).mul_(2).sub_(1)


def widen(data: Tensor) -> Tensor:
    """Make what models take: pixels (B, 3, S, S) uint8 become float32 in [-1, 1], codes (B, L) of any width int64."""
    return floats_of(data) if data.ndim == 4 else data.to(torch.int64)


def _floats_on_the_host(pixels: Tensor) -> Tensor:
    # NumPy asks the kernel for huge pages; touching a new batch in small ones takes longer than filling it. It works in
    # this thread alone, image by image within the cache, while data workers have the other cores.
    wide = np.empty(tuple(pixels.shape), dtype=np.float32)
    narrow = pixels.numpy()
    for image, source in zip(wide, narrow) if wide.ndim == 4 else [(wide, narrow)]:
        image[...] = source
        image /= np.float32(255)
        image *= 2
        image -= 1
    return torch.from_numpy(wide)
