"""Narrow and wide are the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.images.tensors import floats_of, pixels_of, stack_pixels, widen


def images(number: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(number)]


def test_pixels_are_those_of_the_image_whatever_their_order_in_memory() -> None:
    first, second = images(2)
    assert pixels_of(first).shape == (3, 5, 5) and pixels_of(first).dtype == torch.uint8
    assert np.array_equal(pixels_of(first).permute(1, 2, 0), np.asarray(first))
    stacked = torch.stack([pixels_of(first), pixels_of(second)])
    assert torch.equal(stack_pixels([first, second], number=2, side=5), stacked)


def test_every_byte_becomes_the_float_of_the_formula() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = (np.arange(256, dtype=np.float32) / np.float32(255)) * 2 - 1
    assert np.array_equal(floats_of(pixels)[0, 0], expected) and floats_of(pixels).is_contiguous()
    assert floats_of(pixels).min() == -1 and floats_of(pixels).max() == 1


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_codes_of_any_width_become_int64(dtype: torch.dtype) -> None:
    codes = torch.tensor([[0, 4095, 7]])
    assert torch.equal(widen(codes.to(dtype)), codes) and widen(codes.to(dtype)).dtype == torch.int64


def test_a_batch_of_pixels_becomes_floats() -> None:
    pixels = stack_pixels(images(2), number=2, side=5)
    assert torch.equal(widen(pixels), torch.stack([floats_of(pixels_of(image)) for image in images(2)]))
