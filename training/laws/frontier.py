"""The Pareto frontier of a study: the lowest value of a metric that any size reaches with a given compute.

There are three estimators. Two read the curves and are here; the third follows from L(N, D) (parametric_law.py). Each
point of a frontier belongs to the size that reaches it, because intervals are drawn over sizes: neighbouring points of
one curve are no independent evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.laws.power_law import Points
from training.laws.study_data import SizeCurve
from training.laws.study_fit import Interval

GRID_POINTS = 400  # of compute, log-spaced over all curves
HAIR = 1e-9  # relative, that rounding may add to a value
MIN_SIZES = 3  # a size is inside the study if there are a smaller and a larger one


@dataclass(frozen=True)
class Frontier:
    """The points (n,) of a frontier by compute in PFLOP, in groups by size, and sentences on them."""

    points: Points
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def non_dominated(curves: Sequence[SizeCurve], metric: str) -> Points:
    """Return the evaluations that are lower than every cheaper one: the running minimum by compute."""
    names = np.repeat([curve.name for curve in curves], [len(curve.pflop) for curve in curves])
    x = np.concatenate([curve.pflop for curve in curves] or [np.zeros(0)])
    y = np.concatenate([curve.metrics[metric] for curve in curves] or [np.zeros(0)])
    order = np.lexsort((y, x))
    names, x, y = names[order], x[order], y[order]
    best = np.minimum.accumulate(np.concatenate([[np.inf], y]))[:-1]
    return Points(tuple(str(name) for name in names[y < best]), x[y < best], y[y < best])


def interior_minima(curves: Sequence[SizeCurve], metric: str) -> Frontier:
    """Return the lowest curve at log-spaced compute, where a size inside the study has it.

    Curves are interpolated in log-log, each within its own range. Two kinds of points lie above the true frontier and
    are left out: where the smallest or the largest size is the best, because a size beyond it would be better still;
    and where the best run has ended and no other is as low yet.

    Raises:
        ValueError: fewer than three sizes have curves.
    """
    curves = [curve for curve in curves if len(curve.pflop) > 1]
    if len(curves) < MIN_SIZES:
        raise ValueError(f"{len(curves)} sizes have curves of two evaluations; {MIN_SIZES} or more make a frontier")
    grid = np.geomspace(min(curve.pflop[0] for curve in curves), max(curve.pflop[-1] for curve in curves), GRID_POINTS)
    logs = np.stack(  # (sizes, GRID_POINTS), infinite outside each curve
        [
            np.interp(np.log(grid), np.log(curve.pflop), np.log(curve.metrics[metric]), left=np.inf, right=np.inf)
            for curve in curves
        ]
    )
    winners, lowest = logs.argmin(axis=0), np.exp(logs.min(axis=0))
    is_inside = (winners > 0) & (winners < len(curves) - 1) & np.isfinite(lowest)
    is_reached = lowest <= np.minimum.accumulate(lowest) * (1 + HAIR)
    kept = is_inside & is_reached
    names = tuple(curves[index].name for index in winners[kept])
    ends = [int((winners == index).sum()) for index in (0, len(curves) - 1)]
    left_out = [
        f"{GRID_POINTS - int(is_inside.sum())} of {GRID_POINTS} points of compute, where the best size lies at the "
        f"study's edge: at {ends[0]} it is {curves[0].name}, the smallest, at {ends[1]} it is {curves[-1].name}, the "
        "largest"
    ]
    if above := int((is_inside & ~is_reached).sum()):
        left_out.append(f"{above} of {GRID_POINTS} points of compute, where a run that has ended was lower with less")
    return Frontier(Points(names, grid[kept], lowest[kept]), tuple(left_out), _cut_short(curves, winners, grid))


def widened(interval: Interval, exponent: float, other: float) -> Interval:
    """Add the distance to another estimator's exponent to both sides of the interval of a frontier's exponent.

    Draws over sizes show the noise of an estimator but not its bias. If E is given, the bias is the larger of the two:
    on planted studies of twelve sizes, exponents of interior minima are 0.2 to 0.7 % too steep.
    """
    distance = abs(exponent - other)
    return Interval(interval.low - distance, interval.high + distance)


def _cut_short(curves: Sequence[SizeCurve], winners: np.ndarray, grid: np.ndarray) -> tuple[str, ...]:
    """Name the sizes that become the best, or cease to be it, only because their curve begins or ends there."""
    late, short = [], []
    for index, curve in enumerate(curves):
        won = np.flatnonzero(winners == index)
        if won.size and won[0] > 0 and grid[won[0] - 1] < curve.pflop[0]:
            late.append(curve.name)
        if won.size and won[-1] < len(grid) - 1 and grid[won[-1] + 1] > curve.pflop[-1]:
            short.append(curve.name)
    remarks = []
    if late:
        remarks.append(
            f"the curves of {', '.join(late)} begin below all others: the frontier before them is too high; evaluate "
            "earlier, or set a smaller fit.warm_up"
        )
    if short:
        remarks.append(
            f"the runs of {', '.join(short)} end as the best there is: the frontier after them is too high; train them "
            "longer"
        )
    return tuple(remarks)
