"""PSNR and SSIM against their formulas, and the use of codes against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from models.scales import Scales
from training.evaluation.fidelity import bits_per_pixel, code_counts, code_usage, psnr, ssim


def pair(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(0)
    image = gaussian_filter(random.uniform(0, 255, size=(2, 3, 24, 20)), (0, 0, 2, 2)) * 3 % 255
    other = (image + random.normal(0, noise, image.shape)).clip(0, 255)
    return tuple(torch.from_numpy(some.round().astype(np.uint8)) for some in (image, other))


def test_psnr_of_a_constant_offset_is_that_of_its_square() -> None:
    image = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    other = image + torch.tensor([5, 0], dtype=torch.uint8).view(2, 1, 1, 1)
    assert psnr(image, other).tolist() == pytest.approx([10 * math.log10(255**2 / 25), math.inf])


def test_ssim_is_its_formula_with_scipys_window() -> None:
    image, other = pair(20)

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 0, 1.5, 1.5), truncate=5 / 1.5)[..., 5:-5, 5:-5]

    x, y = image.numpy().astype(float), other.numpy().astype(float)
    mean_x, mean_y = blur(x), blur(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * (blur(x * y) - mean_x * mean_y) + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2 + c2)
    assert np.allclose(ssim(image, other).numpy(), (top / bottom).mean((1, 2, 3)), rtol=1e-9)


def test_ssim_falls_with_noise_from_one() -> None:
    assert ssim(*pair(0)).tolist() == pytest.approx([1, 1])
    assert (ssim(*pair(5)) > ssim(*pair(30))).all()
    with pytest.raises(ValueError, match="sides of 11 pixels"):
        ssim(*(some[..., :8] for some in pair(5)))


def test_code_use_is_counted_scale_by_scale() -> None:
    scales = Scales((1, 2))
    codes = torch.tensor([[0, 0, 1, 2, 3], [0, 0, 1, 2, 3]])
    counts = code_counts(codes, scales, 6)
    assert counts.tolist() == [[2, 0, 0, 0, 0, 0], [2, 2, 2, 2, 0, 0]]
    usage = code_usage(counts)
    assert usage["codes_used"] == [1, 4]
    assert usage["perplexity"] == pytest.approx([1, 4])
    assert bits_per_pixel(usage["perplexity"], scales, 4) == pytest.approx((1 * 0 + 4 * 2) / 16)
