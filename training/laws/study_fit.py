"""The settings of a study's fit and its results, as plain values: what fit.json holds, and what reports show.

Every law is y = E + (beta x)^alpha (eqs. 9 and 10, alpha negative). E is in nats, or an error rate; x is in billions of
parameters, or in PFLOP. Intervals hold 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.accounting import ACCOUNTINGS

PARAMETERS, COMPUTE = "parameters", "compute"  # the variables of the laws: billions, PFLOP
TOTAL, EQ8 = "total", "eq8"  # how parameters are counted: all, or 18 d w^2
FITTED, FIXED, KNOWN = "fitted", "fixed", "known"  # where the irreducible loss is from, besides PRESETS
PRESETS = {"paper": (4.5, 5.0), "public-d16": (4.19, 5.0)}  # nats of the last scale, of the average


@dataclass(frozen=True)
class FitConfig:
    """The settings of a fit. Error rates always have the irreducible part 0, as in eqs. 12, 15 and 16."""

    irreducible: str = FITTED  # of the losses: fitted, paper, public-d16, known (the study's known_entropy) or fixed
    irreducible_last: float = 0.0  # nats, with irreducible: fixed
    irreducible_avg: float = 0.0
    accounting: str = "exact"  # of compute: exact, dense_mask, six_nt or paper
    counted_parameters: str = TOTAL  # or eq8, 18 d w^2
    held_out: int = 2  # largest sizes that a law without them has to predict
    gate: float = 0.025  # largest error of that prediction, as a share of the reducible part that was measured
    gate_of_gain: float = 0.2  # and as a share of the fall it predicts, from the sizes it knows to the largest
    warm_up: float = 0.02  # share of a run's images whose evaluations no curve uses: the learning rate is rising
    untrained: float = 0.95  # of ln V: evaluations with a loss above this are of a model that knows nothing
    draws: int = 1000  # of the bootstrap
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("fit.irreducible", self.irreducible, (FITTED, *PRESETS, KNOWN, FIXED))
        _check_choice("fit.accounting", self.accounting, ACCOUNTINGS)
        _check_choice("fit.counted_parameters", self.counted_parameters, (TOTAL, EQ8))
        fixed = (self.irreducible_last, self.irreducible_avg)
        if self.irreducible != FIXED and any(fixed):
            raise ValueError(
                f"fit.irreducible_last and fit.irreducible_avg are {fixed}, but fit.irreducible is "
                f"{self.irreducible!r} and does not use them; set fit.irreducible=fixed or leave them out"
            )
        for name, low, high in (
            ("irreducible_last", 0.0, math.inf),
            ("irreducible_avg", 0.0, math.inf),
            ("held_out", 0, math.inf),
            ("gate", 0.0, math.inf),
            ("gate_of_gain", 0.0, math.inf),
            ("warm_up", 0.0, 0.9),
            ("untrained", 0.1, 1.0),
            ("draws", 100, 100_000),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"fit.{name} is {value}; set a finite number from {low:g} to {high:g}")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; set one of {', '.join(choices)}")


@dataclass(frozen=True)
class Interval:
    """The 95 % interval of a number."""

    low: float
    high: float


@dataclass(frozen=True)
class PowerLaw:
    """y = irreducible + (scale x)^exponent."""

    exponent: float
    scale: float
    irreducible: float

    def reducible(self, x: np.ndarray | float) -> np.ndarray:
        """Return what lies above the irreducible part, for x of any shape."""
        return (self.scale * np.asarray(x, dtype=np.float64)) ** self.exponent

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        return self.irreducible + self.reducible(x)


@dataclass(frozen=True)
class HeldOut:
    """The prediction of one of the largest sizes by a law fitted without them. This is the gate; Pearson's r is not."""

    name: str
    x: float
    measured: float
    predicted: float
    interval: Interval  # of the prediction
    nats: float  # predicted - measured
    share: float  # of the measured reducible part
    share_of_gain: float  # of the fall that the law predicts, from the sizes it knows to the largest
    passed: bool


@dataclass(frozen=True)
class Sensitivity:
    """The law of the same points if another irreducible part is assumed."""

    irreducible: float
    exponent: float
    pearson: float
    held_out_nats: float | None  # worst error of the held-out sizes; None where none could be held out


@dataclass(frozen=True)
class LawFit:
    """The law of one metric by one variable, its points, and how far it can be trusted."""

    metric: str  # one of training.laws.study_data.METRICS
    variable: str  # PARAMETERS or COMPUTE
    law: PowerLaw
    source_of_irreducible: str  # FITTED, or where the fixed value is from
    exponent_interval: Interval  # bootstrap over the points
    exponent_t_interval: Interval  # least squares and Student's t
    scale_interval: Interval
    irreducible_interval: Interval | None  # None where it was fixed
    pearson: float  # of log reducible against log x: reported, never a gate
    r_squared: float
    runs_test: float  # p value of Wald and Wolfowitz's test of the residuals' signs
    names: tuple[str, ...]  # of the points
    x: tuple[float, ...]
    y: tuple[float, ...]
    residuals: tuple[float, ...]  # log y - log law(x)
    sensitivity: tuple[Sensitivity, ...]
    held_out: tuple[HeldOut, ...]  # empty where there are too few sizes
    left_out: tuple[str, ...]  # points that were not used, each with its reason
    draws: tuple[tuple[float, float, float], ...] = ()  # bootstrapped (exponent, scale, irreducible), for bands


@dataclass(frozen=True)
class FrontierLaw:
    """The exponent of one metric's Pareto frontier by one estimator."""

    estimator: str  # "non-dominated", "interior minima" or "parametric"
    law: PowerLaw
    interval: Interval | None


@dataclass(frozen=True)
class SurfaceCheck:
    """The loss of one of the largest sizes beside its prediction by L(N, D) fitted without them."""

    name: str
    measured: float
    predicted: float
    share: float  # of the error, of the measured part above the fitted E
    passed: bool


@dataclass(frozen=True)
class ParametricFit:
    """L(N, D) = E + A N^-a + B D^-b (Hoffmann et al. 2022, eq. 2), N and D in billions of parameters and of tokens."""

    metric: str
    irreducible: float
    parameter_factor: float  # A
    parameter_exponent: float  # a
    token_factor: float  # B
    token_exponent: float  # b
    compute_exponent: float  # ab / (a + b)
    draws: tuple[tuple[float, float, float, float, float], ...]  # bootstrapped (E, A, a, B, b)
    num_points: int
    r_squared: float
    held_out: tuple[SurfaceCheck, ...] = ()  # empty where there are too few sizes

    def __call__(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Return the loss at N billions of parameters and D billions of tokens."""
        by_parameters = self.parameter_factor * np.asarray(parameters, dtype=np.float64) ** -self.parameter_exponent
        return self.irreducible + by_parameters + self.token_factor * np.asarray(tokens) ** -self.token_exponent


@dataclass(frozen=True)
class SeedNoise:
    """The final values of one metric of one size by seed, and how much they differ."""

    size: str
    metric: str
    values: tuple[float, ...]
    relative_deviation: float  # standard deviation over mean


@dataclass(frozen=True)
class StudyFit:
    """The whole result of `fit`; `schema` grows when a field changes its meaning."""

    laws: tuple[LawFit, ...]  # the four metrics against parameters, then against compute
    frontiers: tuple[tuple[str, tuple[FrontierLaw, ...]], ...]  # by metric
    parametric: tuple[ParametricFit, ...]  # of the two losses, where there are points enough
    seeds: tuple[SeedNoise, ...]
    accounting: str  # of the compute
    counted_parameters: str  # "total" or "eq8"
    sizes: tuple[str, ...]
    notes: tuple[str, ...]  # what a reader must know: too few points, sizes left out, extrapolations
    schema: int = 2
