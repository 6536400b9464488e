"""Huber's regression of a curve by scipy: from several starts, and once more for every bootstrap draw of the points.

Both laws of a study use it: y of one variable (power_law.py) and L(N, D) (parametric_law.py). scipy is imported inside
the function that needs it, so that reading a config does not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # parameters (p,) -> predictions (n,), Jacobian (n, p)
TOLERANCE = 1e-11  # relative, of the cost and of a step
COARSE_TOLERANCE = 1e-6  # for one of several starts, and for a bootstrap draw: a thousand of them make an interval
NORMAL_CONSISTENCY = 1.4826  # times the median of |residual| is the standard deviation of normal noise
HUBER = 1.345  # times that deviation: 95 % of least squares' efficiency on normal noise
MIN_DELTA = 1e-9  # residuals of noiseless points are rounding, which no threshold may sort


@dataclass(frozen=True)
class Problem:
    """A model of `target` (n,) whose parameters (p,) lie between `low` and `high`."""

    model: Model
    target: np.ndarray
    low: np.ndarray
    high: np.ndarray
    delta: float = np.inf  # residuals beyond it count linearly; infinite: least squares

    def residuals(self, parameters: np.ndarray) -> np.ndarray:
        """Return target - prediction, (n,)."""
        return self.target - self.model(parameters)[0]

    def cost(self, parameters: np.ndarray) -> float:
        """Return Huber's cost, summed over the points."""
        size = np.abs(self.residuals(parameters))
        inner = np.minimum(size, self.delta)
        return float((inner * (size - inner / 2)).sum())


def huber_delta(residuals: np.ndarray, num_parameters: int) -> float:
    """Return the threshold that suits the noise in the residuals (n,) of a fit."""
    freedom = max(1, residuals.size - num_parameters)
    deviation = NORMAL_CONSISTENCY * float(np.median(np.abs(residuals))) * (residuals.size / freedom) ** 0.5
    return max(HUBER * deviation, MIN_DELTA)


def minimise(problem: Problem, starts: np.ndarray) -> np.ndarray:
    """Return the parameters (p,) of the lowest minimum that is reached from any of the starts (B, p)."""
    points = np.arange(problem.target.size)
    found = [_descend(problem, start, points, COARSE_TOLERANCE) for start in starts]
    return _descend(problem, min(found, key=problem.cost), points, TOLERANCE)


def redraw(problem: Problem, solution: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Fit again with each point repeated as often as each draw of counts (B, n) says; return (B, p)."""
    points = np.arange(problem.target.size)
    return np.stack([_descend(problem, solution, np.repeat(points, row), COARSE_TOLERANCE) for row in counts])


def _descend(problem: Problem, start: np.ndarray, points: np.ndarray, tolerance: float) -> np.ndarray:
    from scipy.optimize import least_squares

    target, is_robust = problem.target[points], np.isfinite(problem.delta)
    return least_squares(
        lambda parameters: problem.model(parameters)[0][points] - target,
        np.clip(start, problem.low, problem.high),
        jac=lambda parameters: problem.model(parameters)[1][points],
        bounds=(problem.low, problem.high),
        loss="huber" if is_robust else "linear",
        f_scale=problem.delta if is_robust else 1.0,
        x_scale="jac",
        ftol=tolerance,
        xtol=tolerance,
        gtol=None,  # it is absolute: with little noise every point of a valley would pass for its bottom
    ).x
