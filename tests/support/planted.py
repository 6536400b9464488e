"""Sizes whose losses obey a planted L(N, D), so that every fit has a known answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.laws.power_law import Points
from training.laws.study_data import SizeCurve, TrainedSize
from training.laws.study_fit import FitConfig

SURFACE = (5.0, 0.6, 0.30, 0.9, 0.34)  # E, A, a, B, b with N and D in billions
COMPUTE_EXPONENT = -SURFACE[2] * SURFACE[4] / (SURFACE[2] + SURFACE[4])
TOTALS = (
    18.492580,
    41.315904,
    78.367716,
    133.186960,
    209.312580,
    310.283520,
    439.638724,
    600.917136,
    797.657700,
    1033.399360,
    1311.681060,
    2010.020356,
)  # millions of parameters of d6 ... d26, d30
DEPTHS = (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30)
BILLIONS = np.asarray(TOTALS) / 1000
NAMES = tuple(f"d{depth}" for depth in DEPTHS)


def surface(parameters: float | np.ndarray, tokens: np.ndarray | float) -> np.ndarray:
    """The planted loss."""
    constant, factor, a, token_factor, b = SURFACE
    return constant + factor * parameters**-a + token_factor * np.asarray(tokens) ** -b


def quick(**settings: object) -> FitConfig:
    """Return settings with fewer bootstrap draws than a study may have, for tests that look at no interval's width."""
    config = FitConfig(**settings)
    object.__setattr__(config, "draws", 10)
    return config


def points_of(y: np.ndarray, x: np.ndarray = BILLIONS) -> Points:
    """Return one point a size, of the twelve or of the first of them."""
    return Points(NAMES[: len(x)], np.asarray(x), np.asarray(y))


def curves(
    parameters: Sequence[float] = BILLIONS, *, num_points: int = 25, noise: float = 0.0, growth: float = 0.5
) -> list[SizeCurve]:
    """Return evaluations over three decades of 6 N D; the largest N sees N^growth as many tokens as the smallest."""
    generator = np.random.default_rng(7)
    found = []
    for index, size in enumerate(parameters):
        end = 50 * (size / parameters[0]) ** growth
        tokens = np.geomspace(end / 1000, end, num_points)
        values = surface(size, tokens) * np.exp(noise * generator.standard_normal(num_points))
        metrics = {"loss_avg": values}
        found.append(SizeCurve(NAMES[index], size, 6 * size * tokens, tokens, metrics, {}))
    return found


def run(index: int, *, seed: int = 0, noise: float = 0.0, num_points: int = 25) -> TrainedSize:
    """A finished run of one of the twelve sizes, 680 tokens an image, 6 N operations a token."""
    generator = np.random.default_rng([index, seed])
    size = BILLIONS[index]
    end = 1e7 * (size / BILLIONS[0]) ** 0.5
    images = np.geomspace(end / 1000, end, num_points).astype(np.int64)
    loss = surface(size, images * 680e-9)
    metrics = {
        "loss_last": loss - 0.5,
        "loss_avg": loss,
        "error_last": (1e-3 * loss) ** 0.01,
        "error_avg": (loss / 7) ** 0.1,
    }
    metrics = {name: value * (1 + noise * generator.standard_normal(num_points)) for name, value in metrics.items()}
    total = round(size * 1e9)
    flops = {"exact": 6 * 680 * total, "six_nt": 7 * 680 * total, "dense_mask": 8 * 680 * total, "paper": 680 * total}
    return TrainedSize(
        name=f"{NAMES[index]}-seed{seed}",
        depth=DEPTHS[index],
        seed=seed,
        num_parameters=total,
        eq8_parameters=round(0.9 * total),
        tokens_per_image=680,
        flops_per_image=flops,
        images=images,
        metrics=metrics,
        is_finished=True,
    )
