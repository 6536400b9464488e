"""L(N, D) = E + A N^-a + B D^-b: a loss by parameters and by tokens (Hoffmann et al. 2022, eq. 2 and their approach 3).

The fit minimises Huber's cost of log L, delta 1e-3, summed over the evaluations of all sizes, from many starts. N and D
are in billions. Two limits: an evaluation within a run comes before the learning rate has fallen to its end, and
repeated images count as tokens like new ones. So the law describes runs of the study's kind only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from training.laws.power_law import MAX_EXPONENT, MAX_LOG_SCALE, r_squared, resample
from training.laws.robust_fit import Problem, minimise, redraw
from training.laws.study_data import SizeCurve
from training.laws.study_fit import FitConfig, ParametricFit, PowerLaw, SurfaceCheck

DELTA = 1e-3  # of log L
MIN_SIZES, MIN_POINTS = 4, 10
MIN_POWER, MAX_POWER = 1e-3, 20.0  # of a and b
EXPONENTS = (0.05, 0.15, 0.35, 0.7, 1.2)  # starts of a and b
SHARES = (0.0, 0.3, 0.6, 0.9, 0.99)  # starts of E, of the lowest loss
SPLITS = (0.1, 0.5, 0.9)  # starts of the share of the rest that more parameters would remove
STARTS = 24  # how many points of the grid of starts, those of least cost, a descent begins at


def fit_parametric(
    curves: Sequence[SizeCurve], metric: str, irreducible: float | None, *, draws: int, rng: np.random.Generator
) -> ParametricFit:
    """Fit the law of one metric, and fit it again to `draws` bootstrap samples of the sizes.

    `irreducible` is in nats; None fits it. Raises ValueError if sizes or evaluations are too few.
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
    solution = minimise(problem, _starts(problem, np.log(losses), irreducible))
    counts = resample(groups, draws=draws, distinct=MIN_SIZES - 1, rng=rng)
    drawn = _natural(redraw(problem, solution, counts), *logs, irreducible)
    constant, a_factor, a, b_factor, b = _natural(solution[None], *logs, irreducible)[0].tolist()
    return ParametricFit(
        metric=metric,
        irreducible=constant,
        parameter_factor=a_factor,
        parameter_exponent=a,
        token_factor=b_factor,
        token_exponent=b,
        compute_exponent=float(compute_exponents(a, b)),
        draws=tuple(map(tuple, drawn.tolist())),
        num_points=len(losses),
        r_squared=r_squared(problem.residuals(solution), losses),
    )


def hold_out_surface(
    curves: Sequence[SizeCurve], metric: str, irreducible: float | None, surface: ParametricFit, *, config: FitConfig
) -> tuple[SurfaceCheck, ...]:
    """Fit the law without the largest sizes and compare what it says of their ends; empty if too few would be left.

    A check passes if the error is at most config.gate of the measured loss above the E of `surface`.
    """
    curves = [curve for curve in curves if len(curve.tokens)]
    first_held = max(MIN_SIZES, len(curves) - config.held_out)
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
        checks.append(SurfaceCheck(curve.name, measured, predicted, share, share <= config.gate))
    return tuple(checks)


def compute_exponents(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """Return ab / (a + b), by which the lowest reducible loss falls with compute if compute is proportional to N D."""
    return np.asarray(a) * np.asarray(b) / (np.asarray(a) + np.asarray(b))


def parametric_frontier(fit: ParametricFit, pflop_per_billions: float) -> PowerLaw:
    """Return the lowest loss by compute that the law allows, for C = pflop_per_billions N D.

    Raises ValueError if it changes too little with compute for a power law.
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
    """Write the law as log L = log(E + exp(c - a n) + exp(d - b m)), with n and m measured from their means.

    The parameters are (E, c, a, d, b), without E if it is given. Around the means c and d are nearly independent of a
    and b, which A and B are not.
    """
    n, m = log_n - log_n.mean(), log_d - log_d.mean()

    def model(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        constant = parameters[0] if irreducible is None else irreducible
        c, a, d, b = parameters[-4:]
        by_n, by_d = (np.exp(np.clip(term, -MAX_EXPONENT, MAX_EXPONENT)) for term in (c - a * n, d - b * m))
        total = constant + by_n + by_d
        columns = [by_n, -n * by_n, by_d, -m * by_d]
        if irreducible is None:
            columns.insert(0, np.ones_like(total))
        return np.log(total), np.stack(columns, axis=-1) / total[:, None]

    low, high = [-MAX_EXPONENT, MIN_POWER] * 2, [MAX_EXPONENT, MAX_POWER] * 2
    if irreducible is None:
        low, high = [0.0, *low], [math.exp(target.min()), *high]
    return Problem(model, target, np.asarray(low), np.asarray(high), DELTA)


def _starts(problem: Problem, target: np.ndarray, irreducible: float | None) -> np.ndarray:
    """Return the points (STARTS, p) of a grid over all parameters that have the least cost."""
    lowest, middle = math.exp(target.min()), math.exp(target.mean())
    constants = [share * lowest for share in SHARES] if irreducible is None else [irreducible]
    rows = []
    for constant, share, a, b in itertools.product(constants, SPLITS, EXPONENTS, EXPONENTS):
        reducible = middle - constant
        row = [constant, math.log(share * reducible), a, math.log((1 - share) * reducible), b]
        rows.append(np.asarray(row if irreducible is None else row[1:]))
    return np.stack(sorted(rows, key=problem.cost)[:STARTS])


def _natural(parameters: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, irreducible: float | None) -> np.ndarray:
    """Turn parameters (B, p) into E, A, a, B, b, (B, 5)."""
    constants = parameters[:, 0] if irreducible is None else np.full(len(parameters), irreducible)
    c, a, d, b = parameters[:, -4:].T
    factors = np.exp(c + a * log_n.mean()), np.exp(d + b * log_d.mean())
    return np.stack([constants, factors[0], a, factors[1], b], axis=-1)
