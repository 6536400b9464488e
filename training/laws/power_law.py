"""One power law with a constant, y = E + (beta x)^alpha (eqs. 9 and 10): its fit, its intervals, its statistics.

Fits are Huber's, of log y: noise of a loss is relative to the loss, so that log y has the same noise at every size,
which log(y - E) has not. E is fitted together with the rest unless it is given. Bootstrap draws are of groups of
points; points of one group (one size on a frontier) stand or fall together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student_t

from training.laws.robust_fit import Problem, huber_delta, minimise, redraw
from training.laws.study_fit import Interval, PowerLaw

CONFIDENCE = 0.95
STEEPEST, FLATTEST = -50.0, -1e-3  # exponents of a fall that is told from a straight line; with E given any sign may be
MAX_LOG_SCALE = 600.0  # beyond it beta is no number: y does not change with x
MAX_EXPONENT = 300.0  # of e, in a trial step that goes astray
E_STARTS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)  # how far below the lowest y, in shares of the range of y


@dataclass(frozen=True)
class Points:
    """What a law is fitted to: groups (n,) by name, x and y (n,) positive."""

    groups: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray

    def names(self) -> tuple[str, ...]:
        """The groups, each once, in the order of their first points."""
        return tuple(dict.fromkeys(self.groups))

    def of(self, names: Sequence[str]) -> Points:
        """The points of some groups."""
        kept = [index for index, group in enumerate(self.groups) if group in names]
        return Points(tuple(self.groups[index] for index in kept), self.x[kept], self.y[kept])

    def one_each(self) -> Points:
        """One point a group, the middle of its own in the logs."""
        members = [np.asarray([group == name for group in self.groups]) for name in self.names()]
        x = [np.exp(np.log(self.x[member]).mean()) for member in members]
        y = [np.exp(np.log(self.y[member]).mean()) for member in members]
        return Points(self.names(), np.asarray(x), np.asarray(y))


@dataclass(frozen=True)
class PowerLawFit:
    """A law, and the same of every bootstrap draw: (B,) irreducible, scale, exponent."""

    law: PowerLaw
    irreducible_draws: np.ndarray
    scale_draws: np.ndarray
    exponent_draws: np.ndarray

    def predictions(self, x: float) -> np.ndarray:
        """(B,) what the draws say at x."""
        return self.irreducible_draws + (self.scale_draws * x) ** self.exponent_draws


def num_free(irreducible: float | None) -> int:
    """Numbers that a fit has to find."""
    return 3 if irreducible is None else 2


def fit_power_law(points: Points, irreducible: float | None) -> PowerLaw:
    """The law of the points. irreducible: nats or a rate; None: fitted, 0 or more.

    Raises ValueError where the points cannot tell a law.
    """
    return _law(*_solve(points, irreducible), points)


def bootstrap(points: Points, irreducible: float | None, *, draws: int, rng: np.random.Generator) -> PowerLawFit:
    """The law, and that of so many draws of its groups with replacement. Raises ValueError like fit_power_law."""
    solution, given = _solve(points, irreducible)
    law = _law(solution, given, points)
    weights = resample(points.groups, draws=draws, distinct=num_free(irreducible), rng=rng)
    delta = huber_delta(_problem(points, given).residuals(solution), solution.size)
    if irreducible is None and given is not None:  # E = 0 for the points themselves is not so for every draw
        solution = np.asarray([solution[0], solution[1], solution[1]])
    found = redraw(replace(_problem(points, irreducible), delta=delta), solution, weights)
    constants, logs, exponents = _natural(found, irreducible)
    below = constants < 0
    if below.any():  # as in _solve
        line = solution[[0, -1]] if given is not None else _solve(points, 0.0)[0]
        at_zero = redraw(replace(_problem(points, 0.0), delta=delta), line, weights[below])
        constants[below], logs[below], exponents[below] = _natural(at_zero, 0.0)
    with np.errstate(divide="ignore"):
        log_scales = np.clip(logs / exponents, -MAX_LOG_SCALE, MAX_LOG_SCALE) - np.log(points.x).mean()
    return PowerLawFit(law, constants, np.exp(log_scales), exponents)


def resample(groups: Sequence[str], *, draws: int, distinct: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, n): how often each point counts when groups are drawn, with replacement, `distinct` ones at least."""
    names = list(dict.fromkeys(groups))
    if len(names) < distinct:
        raise ValueError(f"{len(names)} sizes cannot be resampled; {distinct} or more can")
    counts = np.zeros((0, len(names)), dtype=np.int64)
    while len(counts) < draws:
        more = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        counts = np.concatenate([counts, more[(more > 0).sum(axis=1) >= distinct]])
    return counts[:draws, [names.index(group) for group in groups]].astype(np.float64)


def percentiles(draws: np.ndarray) -> Interval:
    """The middle 95 % of draws (B,)."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, (tail, 100 - tail))
    return Interval(float(low), float(high))


def student_interval(points: Points, irreducible: float | None) -> Interval:
    """95 % for the exponent by least squares and Student's t, one point a group, linearised at the minimum."""
    points = points.one_each()
    solution, given = _solve(points, irreducible, is_robust=False)
    problem = _problem(points, given)
    jacobian, residuals = problem.jacobian(solution), problem.residuals(solution)
    freedom = len(points.x) - solution.size
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * float(residuals @ residuals) / freedom
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(max(0.0, covariance[-1, -1]))
    return Interval(float(solution[-1]) - half, float(solution[-1]) + half)


def pearson(points: Points, irreducible: float) -> float:
    """Pearson's r of log(y - E) against log x; NaN where one of them does not change."""
    x, y = np.log(points.x), np.log(points.y - irreducible)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else math.nan


def r_squared(residuals: np.ndarray, y: np.ndarray) -> float:
    """The share of the variance of log y that a law explains; NaN where y does not change."""
    total = float(((np.log(y) - np.log(y).mean()) ** 2).sum())
    return 1 - float((residuals**2).sum()) / total if total > 0 else math.nan


def runs_test(residuals: np.ndarray) -> float:
    """Two-sided p of Wald and Wolfowitz's test, exact: small when signs of residuals (n,), in order of x, come in runs.

    It is 1 where all residuals have one sign, of which the test knows nothing.
    """
    signs = residuals[residuals != 0] > 0
    positive, negative = int(signs.sum()), int((~signs).sum())
    if not positive or not negative:
        return 1.0
    seen = 1 + int((signs[1:] != signs[:-1]).sum())
    ways = [_orders(runs, positive, negative) for runs in range(2, positive + negative + 1)]
    few, many = sum(ways[: seen - 1]), sum(ways[seen - 2 :])
    return min(1.0, 2 * min(few, many) / sum(ways))


def _orders(runs: int, positive: int, negative: int) -> int:
    """In how many orders so many signs form so many runs."""
    half, odd = divmod(runs, 2)
    if not odd:
        return 2 * math.comb(positive - 1, half - 1) * math.comb(negative - 1, half - 1)
    one, other = math.comb(positive - 1, half) * math.comb(negative - 1, half - 1), math.comb(positive - 1, half - 1)
    return one + other * math.comb(negative - 1, half)


def _problem(points: Points, irreducible: float | None) -> Problem:
    """The law in u = log x less its mean.

    With E given: log y = log(E + exp(c + alpha u)), parameters (c, alpha).
    Else: log y = a + log(1 + g (exp(alpha u) - 1) / alpha), parameters (a, g, alpha): log y and its slope at the
    centre, which points tell well, and the curvature, which they tell badly. In E, c and alpha the minimum lies in a
    long bent valley, where a descent stops too early.
    """
    offsets = np.log(points.x) - np.log(points.x).mean()

    def with_constant(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reducible = np.exp(np.clip(parameters[:, :1] + parameters[:, 1:] * offsets, -MAX_EXPONENT, MAX_EXPONENT))
        share = reducible / (irreducible + reducible)
        return np.log(irreducible + reducible), np.stack([share, share * offsets], axis=-1)

    def with_curvature(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centre, slope, exponent = parameters[:, :1], parameters[:, 1:2], parameters[:, 2:]
        power = np.exp(np.minimum(exponent * offsets, MAX_EXPONENT))
        bend = (power - 1) / exponent
        relative = np.maximum(1 + slope * bend, 1e-12)  # no law is negative: its cost refuses a step that far
        columns = [np.ones_like(bend), bend / relative, slope * (offsets * power - bend) / exponent / relative]
        return centre + np.log(relative), np.stack(columns, axis=-1)

    if irreducible is None:
        low, high = [-MAX_EXPONENT, STEEPEST, STEEPEST], [MAX_EXPONENT, 0.0, FLATTEST]
        return Problem(with_curvature, np.log(points.y), np.asarray(low), np.asarray(high))
    low, high = [-MAX_EXPONENT, STEEPEST], [MAX_EXPONENT, -STEEPEST]
    return Problem(with_constant, np.log(points.y), np.asarray(low), np.asarray(high))


def _natural(parameters: np.ndarray, irreducible: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, p) -> (B,) each: E, log(y - E) at the centre, alpha. An E below 0 comes with NaN for the second."""
    exponents = parameters[:, -1].copy()
    if irreducible is not None:
        return np.full(len(parameters), irreducible), parameters[:, 0].copy(), exponents
    centre, share = np.exp(parameters[:, 0]), parameters[:, 1] / exponents
    logs = np.log(np.maximum(centre * share, 1e-300))
    return centre * (1 - share), logs, exponents


def _starts(points: Points, irreducible: float | None) -> np.ndarray:
    """(B, p): straight lines through log(y - E) for several E."""
    lowest, spread = float(points.y.min()), float(np.ptp(points.y))
    guesses = {max(0.0, lowest - share * spread) for share in E_STARTS} if irreducible is None else {irreducible}
    offsets = np.log(points.x) - np.log(points.x).mean()
    rows = []
    for guess in sorted(guesses):
        logs = np.log(points.y - guess)
        slope = float((offsets * logs).sum() / (offsets**2).sum())
        reducible = math.exp(float(logs.mean()))
        total = guess + reducible
        rows.append(
            [math.log(reducible), slope]
            if irreducible is not None
            else [math.log(total), slope * reducible / total, slope]
        )
    return np.asarray(rows)


def _solve(points: Points, irreducible: float | None, *, is_robust: bool = True) -> tuple[np.ndarray, float | None]:
    """(p,) of least squares, then of Huber's cost at the threshold that suits the noise left; and the E that was given.

    A loss and a rate have E >= 0: where the best E lies below, it is 0, and counts as given.
    """
    _check(points, irreducible)
    problem = _problem(points, irreducible)
    found = minimise(problem, _starts(points, irreducible))
    if is_robust:
        delta = huber_delta(problem.residuals(found.best()), found.best().size)
        found = minimise(replace(problem, delta=delta), found.parameters)
    if irreducible is None and _natural(found.best()[None], None)[0][0] < 0:
        return _solve(points, 0.0, is_robust=is_robust)
    return found.best(), irreducible


def _check(points: Points, irreducible: float | None) -> None:
    sizes, needed = len(points.names()), num_free(irreducible) + 1
    if sizes < needed:
        raise ValueError(f"{sizes} sizes are too few for {needed - 1} numbers; {needed} or more tell a law")
    if not np.ptp(points.x) > 0 or not np.ptp(points.y) > 0:
        raise ValueError("it does not change between the sizes")
    if irreducible is not None and irreducible >= points.y.min():
        raise ValueError(f"the irreducible part {irreducible:.6g} is not below the lowest value, {points.y.min():.6g}")


def _law(solution: np.ndarray, given: float | None, points: Points) -> PowerLaw:
    constant, log_reducible, exponent = (float(value[0]) for value in _natural(solution[None], given))
    if given is None and (exponent >= FLATTEST or constant >= points.y.min()):
        raise ValueError("it does not fall as a power of x above a constant; train more sizes or give fit.irreducible")
    log_scale = log_reducible / exponent if exponent else math.inf
    if abs(log_scale) > MAX_LOG_SCALE:
        raise ValueError("it does not change enough between the sizes for a power law")
    return PowerLaw(exponent, math.exp(log_scale - float(np.log(points.x).mean())), constant)
