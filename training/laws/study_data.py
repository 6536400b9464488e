"""What a scaling study knows of its runs, as arrays: the input of every fit.

Units: images are counted, compute is in PFLOP (a total of 1e15 operations, never per second), losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from training.flops import FLOPS_PER_PFLOP

METRICS = ("loss_last", "loss_avg", "error_last", "error_avg")  # of the validation set, Sec. 5.2
LOSSES = METRICS[:2]


@dataclass(frozen=True)
class TrainedSize:
    """One run of a study: one size, one seed, and what its evaluations have measured."""

    name: str  # of its run folder, such as d6-seed0
    depth: int
    seed: int
    num_parameters: int  # all of them
    eq8_parameters: int  # 18 d w^2, the matrices of the blocks (eq. 8)
    tokens_per_image: int
    flops_per_image: Mapping[str, int]  # by accounting: the names of training.flops.ACCOUNTINGS
    images: np.ndarray  # (P,) int64, seen in training before each evaluation, increasing
    metrics: Mapping[str, np.ndarray]  # (P,) float64 for each of METRICS
    is_finished: bool
    planned_images: int = 0  # of the whole run; 0: not known, and the last evaluation counts as the end
    untrained_loss: float = math.inf  # nats, ln V: the loss of a model that knows nothing; infinite: not known

    def compute(self, accounting: str) -> np.ndarray:
        """(P,) PFLOP spent in training before each evaluation."""
        return self.images * (self.flops_per_image[accounting] / FLOPS_PER_PFLOP)

    def final(self, metric: str) -> float:
        """The last value measured."""
        return float(self.metrics[metric][-1])
