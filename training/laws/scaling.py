"""The fits of a scaling study: the four metrics against parameters and against compute (eqs. 9 to 16).

`analyse` takes what the runs have measured and gives laws, frontiers, intervals and gates as plain values. It reads no
file and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.flops import ACCOUNTINGS
from training.laws.frontier import interior_minima, non_dominated, widened
from training.laws.law_fit import Irreducible, Trust, fit_law
from training.laws.parametric_law import compute_exponents, fit_parametric, hold_out_surface, parametric_frontier
from training.laws.power_law import Points, bootstrap, num_free, percentiles
from training.laws.study_curves import CurveRules, SizeCurve, StudyCurves, study_curves
from training.laws.study_data import LOSSES, METRICS, TrainedSize
from training.laws.study_fit import (
    COMPUTE,
    FITTED,
    PARAMETERS,
    FrontierLaw,
    LawFit,
    ParametricFit,
    SeedNoise,
    StudyFit,
)

FIXED, KNOWN = "fixed", "known"
PRESETS = {"paper": (4.5, 5.0), "public-d16": (4.19, 5.0)}  # nats of the last scale, of the average
SOURCES = {"paper": "an author of VAR, in its issue 23", "public-d16": "a public log of d16 and eq. 11"}
COUNTED_PARAMETERS = ("total", "eq8")
NON_DOMINATED, INTERIOR, PARAMETRIC = "non-dominated", "interior minima", "parametric"  # estimators of a frontier
BORROWED = "that of the law by parameters: the frontier has too few sizes for its own"
MIN_SIZES = 3


@dataclass(frozen=True)
class FitConfig:
    """How a study is fitted. Error rates always have the irreducible part 0, as in eqs. 12, 15 and 16."""

    irreducible: str = FITTED  # of the losses: fitted, paper, public-d16, known (the study's known_entropy) or fixed
    irreducible_last: float = 0.0  # nats, with irreducible: fixed
    irreducible_avg: float = 0.0
    accounting: str = "exact"  # of compute: exact, dense_mask, six_nt or paper
    counted_parameters: str = "total"  # or eq8, 18 d w^2
    held_out: int = 2  # largest sizes that a law without them has to predict
    gate: float = 0.025  # largest error of that prediction, as a share of the reducible part that was measured
    gate_of_gain: float = 0.2  # and as a share of the fall it predicts, from the sizes it knows to the largest
    warm_up: float = 0.02  # share of a run's images whose evaluations no curve uses: the learning rate is rising
    untrained: float = 0.95  # of ln V: no curve has the evaluations with a loss above, of a model that knows nothing
    draws: int = 1000  # of the bootstrap
    seed: int = 0

    def __post_init__(self) -> None:
        choices = (FITTED, *PRESETS, KNOWN, FIXED)
        _check_choice("fit.irreducible", self.irreducible, choices)
        _check_choice("fit.accounting", self.accounting, ACCOUNTINGS)
        _check_choice("fit.counted_parameters", self.counted_parameters, COUNTED_PARAMETERS)
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

    @property
    def trust(self) -> Trust:
        return Trust(self.held_out, self.gate, self.gate_of_gain, self.draws)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; set one of {', '.join(choices)}")


def analyse(runs: Sequence[TrainedSize], config: FitConfig, known: Mapping[str, float] | None = None) -> StudyFit:
    """The laws of a study. known: nats by the names of LOSSES, for fit.irreducible: known.

    A law that the study cannot tell is absent, and a note says why. Raises ValueError where fewer than three sizes have
    finished, or where the irreducible part that is asked for is not given or not below what was measured.
    """
    rules = CurveRules(config.accounting, config.counted_parameters, config.warm_up, config.untrained)
    curves = study_curves(runs, rules)
    finished = [size for size in curves.sizes if size.is_finished]
    if len(finished) < MIN_SIZES:
        raise ValueError(
            f"{len(finished)} sizes of the study have finished; {MIN_SIZES} or more can be fitted, {MIN_SIZES + 1} if "
            "the irreducible loss is fitted too: train the others first"
        )
    notes = list(curves.notes)
    constants = {metric: _irreducible(metric, config, known or {}, runs) for metric in METRICS}
    by_size = {metric: _law_of_size(curves, constants, metric, config, notes) for metric in METRICS}
    by_compute, frontiers, parametric = [], [], []
    for metric in METRICS:
        constant = constants[metric]
        law, estimates = _law_of_compute(curves, constant, metric, by_size[metric], config, notes)
        if metric in LOSSES:
            surfaces, more = _parametric(curves.sizes, constant.value, metric, config, notes)
            parametric += surfaces
            estimates += more
        law, estimates = _with_bias(law, estimates)
        by_compute.append(law)
        frontiers.append((metric, tuple(estimates)))
    laws = tuple(law for law in (*by_size.values(), *by_compute) if law)
    notes += _remarks(laws, config) + surface_remarks(parametric, config)
    return StudyFit(
        laws=laws,
        frontiers=tuple(frontiers),
        parametric=tuple(parametric),
        seeds=_seed_noise(curves.sizes),
        accounting=config.accounting,
        counted_parameters=config.counted_parameters,
        sizes=tuple(size.name for size in curves.sizes),
        notes=tuple(notes),
    )


def _irreducible(
    metric: str, config: FitConfig, known: Mapping[str, float], runs: Sequence[TrainedSize]
) -> Irreducible:
    if metric not in LOSSES:
        return Irreducible(0.0, "0, as in eqs. 12, 15 and 16")
    if config.irreducible == FITTED:
        return Irreducible(None, FITTED)
    index = LOSSES.index(metric)
    if config.irreducible == KNOWN:
        if metric not in known:
            raise ValueError(f"fit.irreducible is known, but {metric} of the data's source is not; set known_entropy")
        return Irreducible(known[metric], "known: the entropy of the data's source")
    if config.irreducible == FIXED:
        value, source = (config.irreducible_last, config.irreducible_avg)[index], "fixed in the config"
    else:
        value, source = PRESETS[config.irreducible][index], f"{config.irreducible}: {SOURCES[config.irreducible]}"
    lowest = min(float(np.nanmin(run.metrics[metric])) for run in runs if np.isfinite(run.metrics[metric]).any())
    if value >= lowest:
        raise ValueError(
            f"fit.irreducible is {config.irreducible}, {value:g} nats of {metric}, but {lowest:.5g} was measured; set "
            "a smaller one, or fitted"
        )
    return Irreducible(value, source)


def _law_of_size(
    curves: StudyCurves, constants: Mapping[str, Irreducible], metric: str, config: FitConfig, notes: list[str]
) -> LawFit | None:
    finished = [size for size in curves.sizes if size.is_finished]
    left_out = [f"{size.name}, which is not finished" for size in curves.sizes if not size.is_finished]
    points = Points(
        tuple(size.name for size in finished),
        np.asarray([size.parameters for size in finished]),
        np.asarray([size.end(metric) for size in finished]),
    )
    try:
        return fit_law(
            points,
            metric,
            PARAMETERS,
            constants[metric],
            trust=config.trust,
            left_out=left_out,
            rng=_generator(config, metric, PARAMETERS),
        )
    except ValueError as error:
        notes.append(f"There is no law of {metric} by parameters: {error}.")
        return None


def _law_of_compute(
    curves: StudyCurves,
    constant: Irreducible,
    metric: str,
    by_size: LawFit | None,
    config: FitConfig,
    notes: list[str],
) -> tuple[LawFit | None, list[FrontierLaw]]:
    """The law of the interior minima, and the frontier's exponent by the estimators that need no surface."""
    rng = _generator(config, metric, COMPUTE)
    law, estimates = None, []
    try:
        points = non_dominated([size for size in curves.sizes if len(size.pflop)], metric)
        fit = bootstrap(points, constant.value, draws=config.draws, rng=rng)
        estimates.append(FrontierLaw(NON_DOMINATED, fit.law, percentiles(fit.exponent_draws)))
    except ValueError as error:
        notes.append(f"There is no law of {metric} on the non-dominated evaluations: {error}.")
    try:
        frontier = interior_minima(curves.sizes, metric)
        notes += [f"{metric}: {note}." for note in frontier.notes]
        left_out = (*curves.left_out, *frontier.left_out)
        if constant.value is None and by_size and len(frontier.points.names()) <= num_free(None):
            constant = Irreducible(by_size.law.irreducible, BORROWED)
        law = fit_law(frontier.points, metric, COMPUTE, constant, trust=config.trust, left_out=left_out, rng=rng)
        estimates.append(FrontierLaw(INTERIOR, law.law, law.exponent_interval))
    except ValueError as error:
        notes.append(f"There is no law of {metric} by compute: {error}.")
    return law, estimates


def _with_bias(law: LawFit | None, estimates: list[FrontierLaw]) -> tuple[LawFit | None, list[FrontierLaw]]:
    """The law of the interior minima with an interval that has the distance to another estimator in it.

    That is the surface's, which has the least bias; the non-dominated evaluations' where there is no surface.
    """
    exponents = {each.estimator: each.law.exponent for each in estimates}
    other = exponents.get(PARAMETRIC, exponents.get(NON_DOMINATED))
    if law is None or other is None:
        return law, estimates
    interval = widened(law.exponent_interval, law.law.exponent, other)
    estimates = [replace(each, interval=interval) if each.estimator == INTERIOR else each for each in estimates]
    return replace(law, exponent_interval=interval), estimates


def _parametric(
    sizes: Sequence[SizeCurve], irreducible: float | None, metric: str, config: FitConfig, notes: list[str]
) -> tuple[list[ParametricFit], list[FrontierLaw]]:
    """L(N, D) and the frontier that follows from it; no more of the two than the study tells."""
    surfaces, estimates = [], []
    try:
        rng = _generator(config, metric, PARAMETRIC)
        surface = fit_parametric(sizes, metric, irreducible, draws=config.draws, rng=rng)
        surface = replace(surface, held_out=hold_out_surface(sizes, metric, irreducible, surface, trust=config.trust))
        surfaces.append(surface)
        # PFLOP per billion parameters and billion tokens drift with size: their geometric mean stands for all sizes
        ratios = [size.pflop[-1] / (size.parameters * size.tokens[-1]) for size in sizes if len(size.pflop)]
        law = parametric_frontier(surface, float(np.exp(np.mean(np.log(ratios)))))
        draws = np.asarray(surface.draws)
        interval = percentiles(-compute_exponents(draws[:, 2], draws[:, 4]))
        estimates.append(FrontierLaw(PARAMETRIC, law, interval))
    except ValueError as error:
        notes.append(f"There is no law of {metric} by parameters and tokens, or no frontier by it: {error}.")
    return surfaces, estimates


def _seed_noise(sizes: Sequence[SizeCurve]) -> tuple[SeedNoise, ...]:
    return tuple(
        SeedNoise(size.name, metric, size.ends[metric], float(np.std(size.ends[metric], ddof=1)) / size.end(metric))
        for size in sizes
        for metric in METRICS
        if len(size.ends[metric]) > 1
    )


def _remarks(laws: Sequence[LawFit], config: FitConfig) -> list[str]:
    remarks = []
    for fit in laws:
        name = f"The law of {fit.metric} by {fit.variable}"
        if len(fit.held_out) < config.held_out:
            remarks.append(f"{name} could hold out {len(fit.held_out)} of the {config.held_out} largest sizes: too few")
        if fit.source_of_irreducible == FITTED and fit.law.irreducible == 0:
            remarks.append(f"{name} has the irreducible part 0, the bound: its points do not bend, so they tell none.")
        if fit.law.exponent >= 0:
            remarks.append(f"{name} rises: it shows no scaling.")
    return remarks


def surface_remarks(surfaces: Sequence[ParametricFit], config: FitConfig) -> list[str]:
    """What speaks against planning by a surface."""
    remarks = []
    for surface in surfaces:
        name = f"L(N, D) of {surface.metric}"
        if config.irreducible == FITTED and surface.irreducible == 0:
            remarks.append(f"{name} has E = 0, the bound: its points tell no irreducible part. Do not plan by it.")
        failed = [check for check in surface.held_out if not check.passed]
        if failed:
            errors = ", ".join(f"{check.predicted:.5g} for {check.measured:.5g} at {check.name}" for check in failed)
            remarks.append(
                f"{name}, fitted without the largest sizes, says {errors}: wrong by more than {config.gate:.2%} of the "
                "reducible part. Do not plan by it."
            )
        elif config.held_out and not surface.held_out:
            remarks.append(f"{name} could hold out no size: too few. Nothing tests a plan by it.")
    return remarks


def _generator(config: FitConfig, metric: str, law: str) -> np.random.Generator:
    """Of its own for each law, so that one law's draws do not depend on the others."""
    return np.random.default_rng([config.seed, METRICS.index(metric), (PARAMETERS, COMPUTE, PARAMETRIC).index(law)])
