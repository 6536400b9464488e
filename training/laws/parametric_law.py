"""L(N, D) = E + A N^-a + B D^-b: a loss by parameters and by tokens (Hoffmann et al. 2022, eq. 2 and their approach 3).

Huber's cost of log L, delta 1e-3, as a sum over the evaluations of all sizes, from many starts. N and D are in
billions, which also keeps the logs of A and B small. Evaluations within a run have not seen its learning rate fall to
the end, and repeated images count as tokens like new ones: the law describes runs of the study's kind.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from training.laws.law_fit import Trust
from training.laws.power_law import MAX_LOG_SCALE, r_squared, resample
from training.laws.robust_fit import Problem, costs_of, minimise, redraw
from training.laws.study_curves import SizeCurve
from training.laws.study_fit import ParametricFit, PowerLaw, SurfaceCheck

DELTA = 1e-3  # of log L
MIN_SIZES, MIN_POINTS = 4, 10
MAX_EXPONENT = 300.0  # of e, in a trial step that goes astray
MIN_POWER, MAX_POWER = 1e-3, 20.0  # of a and b
EXPONENTS = (0.05, 0.15, 0.35, 0.7, 1.2)  # starts of a and b
SHARES = (0.0, 0.3, 0.6, 0.9, 0.99)  # starts of E, of the lowest loss
SPLITS = (0.1, 0.5, 0.9)  # starts of the part of the rest that is for want of parameters
STARTS = 24  # that are descended from: those of least cost in the grid of all


def fit_parametric(
    curves: Sequence[SizeCurve], metric: str, irreducible: float | None, *, draws: int, rng: np.random.Generator
) -> ParametricFit:
    """The law of one metric, and so many bootstrap draws of the sizes. irreducible: nats; None: fitted.

    Raises ValueError where sizes or evaluations are too few to tell it.
    """
    curves = [curve for curve in curves if len(curve.tokens)]
    groups = [curve.name for curve in curves for _ in curve.tokens]
    if len(curves) < MIN_SIZES or len(groups) < MIN_POINTS:
        raise ValueError(
            f"L(N, D) takes {MIN_SIZES} sizes and {MIN_POINTS} evaluations or more, not {len(curves)} and {len(groups)}"
        )
    parameters = np.concatenate([np.full(len(curve.tokens), curve.parameters) for curve in curves])
    tokens = np.concatenate([curve.tokens for curve in curves])
    losses = np.concatenate([curve.metrics[metric] for curve in curves])
    if irreducible is not None and irreducible >= losses.min():
        raise ValueError(f"the irreducible part {irreducible:.6g} is not below the lowest value, {losses.min():.6g}")
    logs = np.log(parameters), np.log(tokens)
    problem = _problem(*logs, np.log(losses), irreducible)
    solution = minimise(problem, _starts(problem, np.log(losses), irreducible)).best()
    weights = resample(groups, draws=draws, distinct=MIN_SIZES - 1, rng=rng)
    drawn = _natural(redraw(problem, solution, weights), *logs, irreducible)
    best = _natural(solution[None], *logs, irreducible)[0]
    return ParametricFit(
        metric,
        *(float(value) for value in best),
        compute_exponent=float(compute_exponents(best[2], best[4])),
        draws=tuple(tuple(float(value) for value in row) for row in drawn),
        num_points=len(losses),
        r_squared=r_squared(problem.residuals(solution), losses),
    )


def hold_out_surface(
    curves: Sequence[SizeCurve], metric: str, irreducible: float | None, surface: ParametricFit, *, trust: Trust
) -> tuple[SurfaceCheck, ...]:
    """What the law without the largest sizes says of their ends; empty where too few sizes would be left.

    Passed within trust.gate of what was measured above the surface's own E.
    """
    curves = [curve for curve in curves if len(curve.tokens)]
    first_held = max(MIN_SIZES, len(curves) - trust.held_out)
    kept, held = curves[:first_held], curves[first_held:]
    if not held:
        return ()
    try:
        fit = fit_parametric(kept, metric, irreducible, draws=1, rng=np.random.default_rng(0))
    except ValueError:
        return ()
    checks = []
    for curve in held:
        measured, predicted = float(curve.metrics[metric][-1]), float(fit(curve.parameters, curve.tokens[-1]))
        share = abs(predicted - measured) / (measured - surface.irreducible)
        checks.append(SurfaceCheck(curve.name, measured, predicted, share, share <= trust.gate))
    return tuple(checks)


def compute_exponents(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """ab / (a + b): how the lowest reducible loss falls with compute, when compute is proportional to N D."""
    return np.asarray(a) * np.asarray(b) / (np.asarray(a) + np.asarray(b))


def parametric_frontier(fit: ParametricFit, pflop_per_billions: float) -> PowerLaw:
    """The lowest loss by compute that the law allows, where C = pflop_per_billions N D.

    Raises ValueError where it does not change enough with compute for a power law.
    """
    a, b, gamma = fit.parameter_exponent, fit.token_exponent, fit.compute_exponent
    # C = k N D: the best N is G (C / k)^(b / (a + b)), the best D the rest of the budget
    best = (a * fit.parameter_factor / (b * fit.token_factor)) ** (1 / (a + b))
    factor = fit.parameter_factor * best**-a + fit.token_factor * best**b
    log_scale = -math.log(factor) / gamma - math.log(pflop_per_billions)
    if abs(log_scale) > MAX_LOG_SCALE:
        raise ValueError("the best loss does not change enough with compute for a power law")
    return PowerLaw(-gamma, math.exp(log_scale), fit.irreducible)


def _problem(log_n: np.ndarray, log_d: np.ndarray, target: np.ndarray, irreducible: float | None) -> Problem:
    """log L = log(E + exp(c - a n) + exp(d - b m)), n and m from their means; parameters (E, c, a, d, b), E if free.

    Around the means c and d are nearly independent of a and b, which A and B are not.
    """
    n, m = log_n - log_n.mean(), log_d - log_d.mean()

    def model(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        constant = parameters[:, :1] if irreducible is None else irreducible
        c, a, d, b = (column[:, None] for column in parameters[:, -4:].T)
        by_n, by_d = (np.exp(np.clip(term, -MAX_EXPONENT, MAX_EXPONENT)) for term in (c - a * n, d - b * m))
        total = constant + by_n + by_d
        columns = [by_n, -n * by_n, by_d, -m * by_d]
        if irreducible is None:
            columns.insert(0, np.ones_like(total))
        return np.log(total), np.stack(columns, axis=-1) / total[..., None]

    bound = np.asarray([MAX_EXPONENT, MAX_POWER, MAX_EXPONENT, MAX_POWER])
    low, high = np.asarray([-MAX_EXPONENT, MIN_POWER, -MAX_EXPONENT, MIN_POWER]), bound
    if irreducible is None:
        low, high = np.concatenate([[0.0], low]), np.concatenate([[math.exp(target.min())], high])
    return Problem(model, target, low, high, DELTA)


def _starts(problem: Problem, target: np.ndarray, irreducible: float | None) -> np.ndarray:
    """(B, p): of a grid of all numbers, those with the least cost."""
    lowest, middle = math.exp(target.min()), math.exp(target.mean())
    constants = [share * lowest for share in SHARES] if irreducible is None else [irreducible]
    rows = []
    for constant, share, a, b in itertools.product(constants, SPLITS, EXPONENTS, EXPONENTS):
        reducible = middle - constant
        row = [constant, math.log(share * reducible), a, math.log((1 - share) * reducible), b]
        rows.append(row if irreducible is None else row[1:])
    grid = np.asarray(rows)
    return grid[np.argsort(costs_of(problem, grid))[:STARTS]]


def _natural(parameters: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, irreducible: float | None) -> np.ndarray:
    """(B, p) -> (B, 5): E, A, a, B, b."""
    constants = parameters[:, 0] if irreducible is None else np.full(len(parameters), irreducible)
    c, a, d, b = parameters[:, -4:].T
    factors = np.exp(c + a * log_n.mean()), np.exp(d + b * log_d.mean())
    return np.stack([constants, factors[0], a, factors[1], b], axis=-1)
