"""How faithful a reconstruction is, image by image: PSNR and SSIM. And how a tokenizer uses its codes, by scale.

PSNR and SSIM are of levels 0 to 255. SSIM is Wang et al. 2004: a Gaussian window of 11 pixels and sigma 1.5, averaged
over the window's full positions and the three colours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.scales import Scales

LEVELS = 255.0
WINDOW, SIGMA = 11, 1.5
LUMINANCE, CONTRAST = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2  # C1 and C2 of the paper


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (N,) in dB of images (N, 3, H, W) uint8; infinite for equal ones."""
    error = (images.double() - others.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(LEVELS**2 / error)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity (N,) of images (N, 3, H, W) uint8; 1 for equal ones.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"images have shape {tuple(images.shape)}; SSIM needs sides of {WINDOW} pixels or more")
    x, y = images.double(), others.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + LUMINANCE) / (mean_x**2 + mean_y**2 + LUMINANCE)
    structure = (2 * covariance + CONTRAST) / (variance_x + variance_y + CONTRAST)
    return (luminance * structure).mean((1, 2, 3))


def code_counts(codes: Tensor, scales: Scales, vocab_size: int) -> Tensor:
    """Count how often each code is used at each scale: codes (N, L) -> (K, V) int64."""
    return torch.stack([torch.bincount(part.flatten(), minlength=vocab_size) for part in scales.split(codes)])


def code_usage(counts: Tensor) -> dict[str, list[float]]:
    """Describe counts (K, V) by scale: the number of codes in use, and exp of the entropy of their shares."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(1)
    return {"codes_used": (counts > 0).sum(1).tolist(), "perplexity": entropy.exp().tolist()}


def bits_per_pixel(perplexities: list[float], scales: Scales, image_size: int) -> float:
    """Return the bits that an ideal code spends on a pixel, if each token is drawn with its scale's shares alone."""
    of_scales = zip(scales.scale_sizes, perplexities, strict=True)
    return sum(tokens * math.log2(perplexity) for tokens, perplexity in of_scales) / image_size**2


def _blur(images: Tensor) -> Tensor:
    """Average images (N, 3, H, W) under the window, where it fits: -> (N, 3, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = (weights / weights.sum()).expand(3, 1, -1)
    rows = F.conv2d(images, window[..., None], groups=3)
    return F.conv2d(rows, window[:, :, None], groups=3)
