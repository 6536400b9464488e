"""The fits of a scaling study: the four metrics against parameters and against compute (eqs. 9 to 16).

`analyse` takes what the runs have measured and returns laws, frontiers, intervals and gates as plain values. It reads
no file and draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from training.laws.frontier import interior_minima, non_dominated, widened
from training.laws.law_fit import Irreducible, fit_law
from training.laws.parametric_law import compute_exponents, fit_parametric, hold_out_surface, parametric_frontier
from training.laws.power_law import Points, bootstrap, num_free, percentiles
from training.laws.study_data import LOSSES, METRICS, SizeCurve, StudyCurves, TrainedSize, study_curves
from training.laws.study_fit import (
    COMPUTE,
    FITTED,
    FIXED,
    KNOWN,
    PARAMETERS,
    PRESETS,
    FitConfig,
    FrontierLaw,
    LawFit,
    ParametricFit,
    SeedNoise,
    StudyFit,
)

SOURCES = {"paper": "an author of VAR, in its issue 23", "public-d16": "a public log of d16 and eq. 11"}
NON_DOMINATED, INTERIOR, PARAMETRIC = "non-dominated", "interior minima", "parametric"  # estimators of a frontier
BORROWED = "that of the law by parameters: the frontier has too few sizes for its own"
MIN_SIZES = 3


def analyse(runs: Sequence[TrainedSize], config: FitConfig, known: Mapping[str, float] | None = None) -> StudyFit:
    """Fit all laws of a study. `known` is in nats by the names of LOSSES, for fit.irreducible=known.

    A law that the study cannot tell is absent, and a note says why.

    Raises:
        ValueError: fewer than three sizes have finished; or the irreducible part that is asked for is not given, or is
            not below what was measured.
    """
    curves = study_curves(runs, config)
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
            config=config,
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
    """Fit the law of the interior minima, and the frontier's exponent by the estimators that need no L(N, D)."""
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
        law = fit_law(frontier.points, metric, COMPUTE, constant, config=config, left_out=left_out, rng=rng)
        estimates.append(FrontierLaw(INTERIOR, law.law, law.exponent_interval))
    except ValueError as error:
        notes.append(f"There is no law of {metric} by compute: {error}.")
    return law, estimates


def _with_bias(law: LawFit | None, estimates: list[FrontierLaw]) -> tuple[LawFit | None, list[FrontierLaw]]:
    """Widen the interval of the interior minima's exponent by its distance to another estimator's.

    The other is that of L(N, D), which has the least bias, or that of the non-dominated evaluations without L(N, D).
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
    """Fit L(N, D), hold out the largest sizes, and derive the frontier; a note says what the study cannot tell."""
    surfaces, estimates = [], []
    try:
        rng = _generator(config, metric, PARAMETRIC)
        surface = fit_parametric(sizes, metric, irreducible, draws=config.draws, rng=rng)
        surface = replace(surface, held_out=hold_out_surface(sizes, metric, irreducible, surface, config=config))
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
    """Say what speaks against planning by L(N, D)."""
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
    """Return a generator for one law, whose draws do not depend on the other laws."""
    return np.random.default_rng([config.seed, METRICS.index(metric), (PARAMETERS, COMPUTE, PARAMETRIC).index(law)])
