"""One power law with a constant, y = E + (beta x)^alpha (eqs. 9 and 10): its fit, its intervals, its statistics.

Fits minimise Huber's cost of log y. The noise of a loss is proportional to the loss, so log y has the same noise at
every size, which log(y - E) has not. E is fitted together with the rest unless it is given. The bootstrap draws groups
of points: on a frontier a group is one size, because neighbouring points of one curve are no independent evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.laws.robust_fit import Problem, huber_delta, minimise, redraw
from training.laws.study_fit import Interval, PowerLaw

CONFIDENCE = 0.95
STEEPEST, FLATTEST = -50.0, -1e-3  # of an exponent fitted together with E; given E it may have any sign
MAX_LOG_SCALE = 600.0  # beyond it beta is no floating point number: y does not change with x
MAX_EXPONENT = 300.0  # of e, in a trial step that goes astray
E_STARTS = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)  # how far below the lowest y, in shares of the range of y


@dataclass(frozen=True)
class Points:
    """The points of a law: the name of each one's group (n,), and x and y (n,), which are positive."""

    groups: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray

    def names(self) -> tuple[str, ...]:
        """Return the groups, each once, in the order of their first points."""
        return tuple(dict.fromkeys(self.groups))

    def of(self, names: Sequence[str]) -> Points:
        """Return the points of some groups."""
        kept = [index for index, group in enumerate(self.groups) if group in names]
        return Points(tuple(self.groups[index] for index in kept), self.x[kept], self.y[kept])

    def one_each(self) -> Points:
        """Return one point a group: the geometric mean of its points."""
        members = [np.asarray([group == name for group in self.groups]) for name in self.names()]
        x = [np.exp(np.log(self.x[member]).mean()) for member in members]
        y = [np.exp(np.log(self.y[member]).mean()) for member in members]
        return Points(self.names(), np.asarray(x), np.asarray(y))


@dataclass(frozen=True)
class PowerLawFit:
    """A law, and the numbers of every bootstrap draw: (B,) irreducible, scale, exponent."""

    law: PowerLaw
    irreducible_draws: np.ndarray
    scale_draws: np.ndarray
    exponent_draws: np.ndarray

    def predictions(self, x: float) -> np.ndarray:
        """Return what every draw says at x, (B,)."""
        return self.irreducible_draws + (self.scale_draws * x) ** self.exponent_draws


def num_free(irreducible: float | None) -> int:
    """Return how many numbers a fit has to find."""
    return 3 if irreducible is None else 2


def fit_power_law(points: Points, irreducible: float | None) -> PowerLaw:
    """Fit a law. `irreducible` is in nats or a rate; None fits it, at 0 or above.

    Raises:
        ValueError: the points cannot tell a law.
    """
    return _law(*_solve(points, irreducible), points)


def bootstrap(points: Points, irreducible: float | None, *, draws: int, rng: np.random.Generator) -> PowerLawFit:
    """Fit a law, and fit it again to `draws` samples of its groups with replacement. Raises like `fit_power_law`."""
    solution, given = _solve(points, irreducible)
    law = _law(solution, given, points)
    counts = resample(points.groups, draws=draws, distinct=num_free(irreducible), rng=rng)
    delta = huber_delta(_problem(points, given).residuals(solution), solution.size)
    if irreducible is None and given is not None:  # the whole set has E = 0, but a draw of it may have more
        solution = np.asarray([solution[0], solution[1], solution[1]])
    found = redraw(replace(_problem(points, irreducible), delta=delta), solution, counts)
    constants, logs, exponents = _natural(found, irreducible)
    below = constants < 0
    if below.any():  # as in _solve
        line = solution[[0, -1]] if given is not None else _solve(points, 0.0)[0]
        at_zero = redraw(replace(_problem(points, 0.0), delta=delta), line, counts[below])
        constants[below], logs[below], exponents[below] = _natural(at_zero, 0.0)
    with np.errstate(divide="ignore"):
        log_scales = np.clip(logs / exponents, -MAX_LOG_SCALE, MAX_LOG_SCALE) - np.log(points.x).mean()
    return PowerLawFit(law, constants, np.exp(log_scales), exponents)


def resample(groups: Sequence[str], *, draws: int, distinct: int, rng: np.random.Generator) -> np.ndarray:
    """Draw groups with replacement, at least `distinct` different ones; return how often each point counts, (draws, n).

    Raises:
        ValueError: there are fewer groups than that.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < distinct:
        raise ValueError(f"{len(names)} sizes cannot be resampled; {distinct} or more can")
    counts = np.zeros((0, len(names)), dtype=np.int64)
    while len(counts) < draws:
        more = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
        counts = np.concatenate([counts, more[(more > 0).sum(axis=1) >= distinct]])
    return counts[:draws, [names.index(group) for group in groups]]


def percentiles(draws: np.ndarray) -> Interval:
    """Return the interval that holds the middle 95 % of draws (B,)."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, (tail, 100 - tail))
    return Interval(float(low), float(high))


def student_interval(points: Points, irreducible: float | None) -> Interval:
    """Return the exponent's 95 % interval by least squares and Student's t.

    Each group counts as one point. The law is linearised at the minimum.
    """
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats has it too and loads ten times as long

    points = points.one_each()
    solution, given = _solve(points, irreducible, is_robust=False)
    problem = _problem(points, given)
    jacobian, residuals = problem.model(solution)[1], problem.residuals(solution)
    freedom = len(points.x) - solution.size
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * float(residuals @ residuals) / freedom
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(max(0.0, covariance[-1, -1]))
    return Interval(float(solution[-1]) - half, float(solution[-1]) + half)


def pearson(points: Points, irreducible: float) -> float:
    """Return Pearson's r of log(y - E) against log x; NaN if either of them is constant."""
    x, y = np.log(points.x), np.log(points.y - irreducible)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else math.nan


def r_squared(residuals: np.ndarray, y: np.ndarray) -> float:
    """Return the share of the variance of log y that a law explains; NaN if y is constant."""
    total = float(((np.log(y) - np.log(y).mean()) ** 2).sum())
    return 1 - float((residuals**2).sum()) / total if total > 0 else math.nan


def runs_test(residuals: np.ndarray) -> float:
    """Return the exact two-sided p of Wald and Wolfowitz's runs test of the residuals (n,), in order of x.

    A small p says that signs come in runs, as they do about a law of the wrong form. It is 1 if all signs are equal,
    of which the test knows nothing.
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
    """Count the orders of so many positive and negative signs that form so many runs."""
    half, odd = divmod(runs, 2)
    if not odd:
        return 2 * math.comb(positive - 1, half - 1) * math.comb(negative - 1, half - 1)
    one, other = math.comb(positive - 1, half) * math.comb(negative - 1, half - 1), math.comb(positive - 1, half - 1)
    return one + other * math.comb(negative - 1, half)


def _problem(points: Points, irreducible: float | None) -> Problem:
    """Write the law in u = log x less its mean, so that its parameters hardly depend on each other.

    With E given, log y = log(E + exp(c + alpha u)) has the parameters (c, alpha). With E free,
    log y = a + log(1 + g (exp(alpha u) - 1) / alpha) has (a, g, alpha): a and g are log y and its slope at the centre,
    which the points tell well, and alpha is the curvature, which they tell badly. In E, c and alpha the minimum would
    lie in a long bent valley, where a descent stops too early.
    """
    offsets = np.log(points.x) - np.log(points.x).mean()

    def with_constant(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reducible = np.exp(np.clip(parameters[0] + parameters[1] * offsets, -MAX_EXPONENT, MAX_EXPONENT))
        share = reducible / (irreducible + reducible)
        return np.log(irreducible + reducible), np.stack([share, share * offsets], axis=-1)

    def with_curvature(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centre, slope, exponent = parameters
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
    """Turn parameters (B, p) into E, log(y - E) at the centre, and alpha, (B,) each. The second is void if E < 0."""
    exponents = parameters[:, -1].copy()
    if irreducible is not None:
        return np.full(len(parameters), irreducible), parameters[:, 0].copy(), exponents
    centre, share = np.exp(parameters[:, 0]), parameters[:, 1] / exponents
    logs = np.log(np.maximum(centre * share, 1e-300))
    return centre * (1 - share), logs, exponents


def _starts(points: Points, irreducible: float | None) -> np.ndarray:
    """Fit straight lines through log(y - E) for several E; return their parameters (B, p)."""
    lowest, spread = float(points.y.min()), float(np.ptp(points.y))
    guesses = {max(0.0, lowest - share * spread) for share in E_STARTS} if irreducible is None else {irreducible}
    offsets = np.log(points.x) - np.log(points.x).mean()
    rows = []
    for guess in sorted(guesses):
        logs = np.log(points.y - guess)
        slope = float((offsets * logs).sum() / (offsets**2).sum())
        reducible = math.exp(float(logs.mean()))
        total = guess + reducible
        with_curvature = [math.log(total), slope * reducible / total, slope]
        rows.append(with_curvature if irreducible is None else [math.log(reducible), slope])
    return np.asarray(rows)


def _solve(points: Points, irreducible: float | None, *, is_robust: bool = True) -> tuple[np.ndarray, float | None]:
    """Fit by least squares, then by Huber's cost at the threshold that suits the noise that is left.

    Returns the parameters (p,) and the E that counts as given. A loss and a rate have E >= 0: if the best E lies below
    0, then it is 0 and counts as given.
    """
    _check(points, irreducible)
    problem = _problem(points, irreducible)
    found = minimise(problem, _starts(points, irreducible))
    if is_robust:
        delta = huber_delta(problem.residuals(found), found.size)
        found = minimise(replace(problem, delta=delta), found[None])
    if irreducible is None and _natural(found[None], None)[0][0] < 0:
        return _solve(points, 0.0, is_robust=is_robust)
    return found, irreducible


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
