"""One law of a study, and how far to trust it: intervals, residuals, sensitivity and the gate.

The gate is prediction: a law that is fitted without the largest sizes must say what they reach. Pearson's r is no gate:
if E is wrong by half of the reducible part, the r of a perfect power law is still above 0.99.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.laws.power_law import (
    Points,
    bootstrap,
    fit_power_law,
    num_free,
    pearson,
    percentiles,
    r_squared,
    runs_test,
    student_interval,
)
from training.laws.study_fit import FitConfig, HeldOut, LawFit, PowerLaw, Sensitivity

# other values of E to assume: so far from the law's own, in shares of what lies between it and the lowest value
SHIFTS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Irreducible:
    """The constant of a law: a value with its source, or None if it is to be fitted."""

    value: float | None
    source: str


def fit_law(
    points: Points,
    metric: str,
    variable: str,
    irreducible: Irreducible,
    *,
    config: FitConfig,
    left_out: Sequence[str],
    rng: np.random.Generator,
) -> LawFit:
    """Fit the law of a metric to points in order of x. Raises ValueError if they cannot tell one."""
    fit = bootstrap(points, irreducible.value, draws=config.draws, rng=rng)
    law = fit.law
    residuals = np.log(points.y) - np.log(law(points.x))
    middles = points.one_each()
    draws = np.stack([fit.exponent_draws, fit.scale_draws, fit.irreducible_draws], axis=-1)
    return LawFit(
        metric=metric,
        variable=variable,
        law=law,
        source_of_irreducible=irreducible.source,
        exponent_interval=percentiles(fit.exponent_draws),
        exponent_t_interval=student_interval(points, irreducible.value),
        scale_interval=percentiles(fit.scale_draws),
        irreducible_interval=percentiles(fit.irreducible_draws) if irreducible.value is None else None,
        pearson=pearson(points, law.irreducible),
        r_squared=r_squared(residuals, points.y),
        runs_test=runs_test(np.log(middles.y) - np.log(law(middles.x))),
        names=points.groups,
        x=tuple(points.x.tolist()),
        y=tuple(points.y.tolist()),
        residuals=tuple(residuals.tolist()),
        sensitivity=_sensitivity(points, law, config.held_out),
        held_out=hold_out(points, irreducible.value, law.irreducible, config=config, rng=rng),
        left_out=tuple(left_out),
        draws=tuple(map(tuple, draws.tolist())),
    )


def hold_out(
    points: Points, irreducible: float | None, reference: float, *, config: FitConfig, rng: np.random.Generator
) -> tuple[HeldOut, ...]:
    """Fit a law without the largest sizes and let it predict each of them, at the middle of its points.

    Shares of the error are of what was measured above `reference`, an irreducible part. Returns nothing if too few
    sizes would be left, or if they tell no law.
    """
    kept, held = split(points, config.held_out, irreducible)
    if not len(held.x):
        return ()
    try:
        fit = bootstrap(kept, irreducible, draws=config.draws, rng=rng)
    except ValueError:
        return ()
    noise = _noise(kept, fit.law, num_free(irreducible))
    gain = float(fit.law(kept.x.max()) - fit.law(held.x.max()))
    results = []
    for name, x, measured in zip(held.groups, held.x.tolist(), held.y.tolist(), strict=True):
        predicted = float(fit.law(x))
        drawn = fit.predictions(x) * np.exp(rng.choice(noise, size=config.draws))
        error = predicted - measured
        share = abs(error) / (measured - reference)
        share_of_gain = abs(error) / gain if gain > 0 else np.inf
        # an error rate hardly moves: 2.5 % of it is most of what all sizes gain, and a law of no change would pass
        passed = share <= config.gate and share_of_gain <= config.gate_of_gain
        results.append(HeldOut(name, x, measured, predicted, percentiles(drawn), error, share, share_of_gain, passed))
    return tuple(results)


def split(points: Points, held_out: int, irreducible: float | None) -> tuple[Points, Points]:
    """Return the points of the smaller sizes, and a middle point of each of the largest `held_out` sizes.

    Fewer are held out if the smaller sizes would not be enough to fit a law.
    """
    middles = points.one_each()
    names = [middles.groups[index] for index in np.argsort(middles.x)]
    spare = max(0, len(names) - num_free(irreducible) - 1)
    first_held = len(names) - min(held_out, spare)
    return points.of(names[:first_held]), middles.of(names[first_held:])


def _noise(points: Points, law: PowerLaw, num_parameters: int) -> np.ndarray:
    """Return the residuals of log y at the groups' middles, widened by what the fit has taken from them, (groups,)."""
    middles = points.one_each()
    residuals = np.log(middles.y) - np.log(law(middles.x))
    return residuals * (residuals.size / max(1, residuals.size - num_parameters)) ** 0.5


def _sensitivity(points: Points, law: PowerLaw, held_out: int) -> tuple[Sensitivity, ...]:
    """Fit the same points with E = 0 and with E around the law's own; an E that leaves no law is skipped."""
    reducible = float(points.y.min()) - law.irreducible
    values = {0.0, *(max(0.0, law.irreducible + shift * reducible) for shift in SHIFTS)}
    rows = []
    for value in sorted(values):
        kept, held = split(points, held_out, value)
        try:
            exponent = fit_power_law(points, value).exponent
            errors = fit_power_law(kept, value)(held.x) - held.y if len(held.x) else np.zeros(0)
        except ValueError:
            continue
        worst = float(errors[np.abs(errors).argmax()]) if errors.size else None
        rows.append(Sensitivity(value, exponent, pearson(points, value), worst))
    return tuple(rows)
