"""Huber's regression of a curve, for many starts or many bootstrap draws at once.

Levenberg and Marquardt's method on arrays: each row of B is its own problem, with its own weights of the same n points.
The cost is the sum over points, never the mean: a mean of 1e-7 meets an optimiser's tolerance before it is a minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # (B, p) -> predictions (B, n), their Jacobian (B, n, p)
MAX_ITERATIONS, TOLERANCE = 300, 1e-11  # the tolerance is of a step, relative to 1 + |parameter|
DRAW_ITERATIONS, DRAW_TOLERANCE = 50, 1e-5  # of a bootstrap draw, which is one of a thousand that make an interval
MAX_DAMPING = 1e12  # no step of any length helps: a minimum up to rounding
NORMAL_CONSISTENCY = 1.4826  # times the median of |residual| is the standard deviation of normal noise
HUBER = 1.345  # times that deviation: 95 % of least squares' efficiency on normal noise
MIN_DELTA = 1e-9  # noiseless points: their residuals are rounding, which no threshold may sort


@dataclass(frozen=True)
class Minimum:
    """Where the descents ended: parameters (B, p), costs (B,)."""

    parameters: np.ndarray
    costs: np.ndarray

    def best(self) -> np.ndarray:
        """(p,) of the lowest cost."""
        return self.parameters[int(np.argmin(self.costs))]


@dataclass(frozen=True)
class Problem:
    """Points of which a model should predict `target` (n,), with parameters between low and high (p,)."""

    model: Model
    target: np.ndarray
    low: np.ndarray
    high: np.ndarray
    delta: float = np.inf  # residuals beyond it count linearly; infinite: least squares

    def residuals(self, parameters: np.ndarray) -> np.ndarray:
        """(p,) -> (n,) target - prediction."""
        return self.target - self.model(parameters[None])[0][0]

    def jacobian(self, parameters: np.ndarray) -> np.ndarray:
        """(p,) -> (n, p), derivatives of the prediction."""
        return self.model(parameters[None])[1][0]


def huber_delta(residuals: np.ndarray, num_parameters: int) -> float:
    """The threshold that suits the noise seen in residuals (n,) of a fit."""
    freedom = max(1, residuals.size - num_parameters)
    deviation = NORMAL_CONSISTENCY * float(np.median(np.abs(residuals))) * (residuals.size / freedom) ** 0.5
    return max(HUBER * deviation, MIN_DELTA)


def minimise(problem: Problem, starts: np.ndarray) -> Minimum:
    """Descend from each of starts (B, p)."""
    return _descend(problem, starts, np.ones((len(starts), problem.target.size)), MAX_ITERATIONS, TOLERANCE)


def redraw(problem: Problem, solution: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B, p): the solution (p,) again, with each point counted as often as a draw of weights (B, n) says."""
    starts = np.tile(solution, (len(weights), 1))
    return _descend(problem, starts, weights, DRAW_ITERATIONS, DRAW_TOLERANCE).parameters


def _descend(problem: Problem, starts: np.ndarray, weights: np.ndarray, iterations: int, tolerance: float) -> Minimum:
    parameters = np.clip(starts, problem.low, problem.high)
    predictions, jacobian = problem.model(parameters)
    costs = _costs(problem, predictions, weights)
    damping = np.full(len(starts), 1e-3)
    active = np.arange(len(starts))
    for _ in range(iterations):
        here = parameters[active]
        steps = _steps(problem, here, predictions[active], jacobian[active], weights[active], damping[active])
        trials = np.clip(here + steps, problem.low, problem.high)
        moved = np.abs(trials - here)
        trial_predictions, trial_jacobian = problem.model(trials)
        trial_costs = _costs(problem, trial_predictions, weights[active])
        better = trial_costs <= costs[active]
        improved = active[better]
        is_small = (moved <= tolerance * (1 + np.abs(trials))).all(axis=1)
        parameters[improved], costs[improved] = trials[better], trial_costs[better]
        predictions[improved], jacobian[improved] = trial_predictions[better], trial_jacobian[better]
        damping[active] = np.where(better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 4)
        active = active[~is_small & (damping[active] < MAX_DAMPING)]
        if not active.size:
            break
    return Minimum(parameters, costs)


def costs_of(problem: Problem, parameters: np.ndarray) -> np.ndarray:
    """(B, p) -> (B,), the sum over points of Huber's cost."""
    return _costs(problem, problem.model(parameters)[0], np.ones((1, problem.target.size)))


def _costs(problem: Problem, predictions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    size = np.abs(problem.target - predictions)
    inner = np.minimum(size, problem.delta)
    return (weights * inner * (size - inner / 2)).sum(axis=1)


def _steps(
    problem: Problem,
    parameters: np.ndarray,
    predictions: np.ndarray,
    jacobian: np.ndarray,
    weights: np.ndarray,
    damping: np.ndarray,
) -> np.ndarray:
    """(B, p): Gauss-Newton steps of Huber's cost; a parameter pushed against its bound stays.

    Only residuals within delta curve the cost. The damping takes all of them, reweighted, so that it holds without any.
    """
    residuals = problem.target - predictions
    factors = weights * np.minimum(1, problem.delta / np.maximum(np.abs(residuals), 1e-300))
    downhill = (jacobian * (factors * residuals)[..., None]).sum(axis=1)  # (B, p)
    curved = weights * (np.abs(residuals) <= problem.delta)
    normal = np.swapaxes(jacobian * curved[..., None], 1, 2) @ jacobian  # (B, p, p)
    diagonal = (jacobian**2 * factors[..., None]).sum(axis=1)
    stuck = ((parameters <= problem.low) & (downhill < 0)) | ((parameters >= problem.high) & (downhill > 0))
    normal = np.where(stuck[:, :, None] | stuck[:, None, :], 0, normal)
    downhill = np.where(stuck, 0, downhill)
    floor = 1e-14 * diagonal.max(axis=1, keepdims=True) + 1e-300  # a parameter that nothing depends on stays
    identity = np.eye(parameters.shape[1])
    damped = normal + identity * (damping[:, None] * diagonal + floor + stuck)[:, None]
    return np.linalg.solve(damped, downhill[..., None])[..., 0]
