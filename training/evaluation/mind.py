"""MIND: a sliced Wasserstein distance between two sets of features, cheap enough for a look inside a training run.

Both sets are projected on random directions, where the distance between equally many numbers is that of the sorted
ones (arXiv 2605.06797; the constants are those of torch-fidelity's main branch, metric_mind.py). It is meant for about
5,000 images. Values of different feature extractors cannot be compared.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from training.evaluation.gaussians import check_features

Array = NDArray[np.floating]

CHUNK = 100  # directions at once


def mind(real: Array, generated: Array, *, directions: int = 1000, seed: int = 2020) -> float:
    """Return 3 D times the mean over directions of the mean squared difference of sorted projections.

    real (N, D) and generated (M, D): of the larger set, M or N features are drawn. A shift by t gives about 3 |t|^2.

    Raises:
        ValueError: the widths differ, or a set is empty.
    """
    check_features(real)
    check_features(generated, width=real.shape[1])
    size = min(len(real), len(generated))
    if size == 0:
        raise ValueError(f"there are {len(real)} real and {len(generated)} generated features; one of each is needed")
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.from_numpy(features).float() for features in (real, generated))
    if len(first) > size:
        first = first[torch.randperm(len(first), generator=generator)[:size]]
    elif len(second) > size:
        second = second[torch.randperm(len(second), generator=generator)[:size]]
    width = first.shape[1]
    units = torch.nn.functional.normalize(torch.randn(directions, width, generator=generator), dim=1)
    total = 0.0
    for some in units.split(CHUNK):
        gaps = (first @ some.T).sort(dim=0).values - (second @ some.T).sort(dim=0).values
        total += gaps.double().square().mean(0).sum().item()
    return 3 * width * total / directions
