"""The results of a study's fits, as plain values: what `fit` writes to fit.json, and what figures and reports show.

Every law is y = E + (beta x)^alpha (eqs. 9 and 10, alpha negative): E in nats, or an error rate; x in billions of
parameters, or in PFLOP. Intervals hold 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PARAMETERS, COMPUTE = "parameters", "compute"  # the variables of the laws: billions, PFLOP
FITTED = "fitted"


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
        """What is above the irreducible part, for x of any shape."""
        return (self.scale * np.asarray(x, dtype=np.float64)) ** self.exponent

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        return self.irreducible + self.reducible(x)


@dataclass(frozen=True)
class HeldOut:
    """What a law fitted without the largest sizes says of one of them. This is the gate; Pearson's r is not."""

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
    """The same points with another irreducible part assumed."""

    irreducible: float
    exponent: float
    pearson: float
    held_out_nats: float | None  # worst error of the held-out sizes; None where none could be held out


@dataclass(frozen=True)
class LawFit:
    """One law, its points and how far it can be trusted."""

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
    """The end of one of the largest sizes beside what L(N, D) says of it, fitted without them."""

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
        """The loss at N billions of parameters and D billions of tokens."""
        by_parameters = self.parameter_factor * np.asarray(parameters, dtype=np.float64) ** -self.parameter_exponent
        return self.irreducible + by_parameters + self.token_factor * np.asarray(tokens) ** -self.token_exponent


@dataclass(frozen=True)
class SeedNoise:
    """How much the final metric of one size differs between seeds."""

    size: str
    metric: str
    values: tuple[float, ...]
    relative_deviation: float  # standard deviation over mean


@dataclass(frozen=True)
class StudyFit:
    """All that `fit` finds; `schema` grows when a field changes its meaning."""

    laws: tuple[LawFit, ...]  # the four metrics against parameters, then against compute
    frontiers: tuple[tuple[str, tuple[FrontierLaw, ...]], ...]  # by metric
    parametric: tuple[ParametricFit, ...]  # of the two losses, where there are points enough
    seeds: tuple[SeedNoise, ...]
    accounting: str  # of the compute
    counted_parameters: str  # "total" or "eq8"
    sizes: tuple[str, ...]
    notes: tuple[str, ...]  # what a reader must know: too few points, sizes left out, extrapolations
    schema: int = 2
