"""A whole study, planted: all laws come out, and what cannot be told is said."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from planted import BILLIONS, COMPUTE_EXPONENT, SURFACE, quick, run

from training.laws.scaling import BORROWED, analyse, surface_remarks
from training.laws.study_data import LOSSES, METRICS, TrainedSize
from training.laws.study_fit import COMPUTE, FITTED, PARAMETERS, PRESETS, FitConfig, LawFit, StudyFit, SurfaceCheck

QUICK = quick()


def law(fit: StudyFit, metric: str, variable: str) -> LawFit:
    return next(law for law in fit.laws if (law.metric, law.variable) == (metric, variable))


def study(num_sizes: int) -> list[TrainedSize]:
    """The sizes, smallest first, each evaluated 25 times."""
    return [run(index) for index in range(num_sizes)]


def planted_study(num_sizes: int) -> list[TrainedSize]:
    """The sizes, and two more seeds of the smallest."""
    return [*study(num_sizes), run(0, seed=1, noise=1e-3), run(0, seed=2, noise=1e-3)]


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    return analyse(planted_study(12), QUICK)


def test_a_study_has_four_laws_of_size_and_four_of_compute(fit: StudyFit) -> None:
    found = [(law.metric, law.variable) for law in fit.laws]
    assert found == [(metric, variable) for variable in (PARAMETERS, COMPUTE) for metric in METRICS]
    assert fit.sizes[0] == "d6" and len(fit.sizes) == 12


def test_the_planted_exponents_come_out(fit: StudyFit) -> None:
    by_compute = law(fit, "loss_avg", COMPUTE)
    assert by_compute.law.exponent == pytest.approx(COMPUTE_EXPONENT, rel=0.03)
    assert by_compute.law.irreducible == pytest.approx(SURFACE[0], abs=0.02)
    estimates = {law.estimator: law for law in dict(fit.frontiers)["loss_avg"]}
    assert set(estimates) == {"non-dominated", "interior minima", "parametric"}
    assert estimates["parametric"].law.exponent == pytest.approx(COMPUTE_EXPONENT, rel=0.005)
    interior = estimates["interior minima"]
    assert (interior.law, interior.interval) == (by_compute.law, by_compute.exponent_interval)
    assert interior.interval.low <= estimates["parametric"].law.exponent <= interior.interval.high, "it has its bias"
    x = np.asarray(by_compute.x)  # both in PFLOP: the two frontiers lie on each other
    assert estimates["parametric"].law(x) == pytest.approx(by_compute.law(x), rel=2e-3)
    assert all(point.passed for point in by_compute.held_out)
    surface = fit.parametric[1]
    assert (surface.metric, surface.parameter_exponent) == ("loss_avg", pytest.approx(SURFACE[2], rel=0.01))


def test_error_rates_have_no_irreducible_part(fit: StudyFit) -> None:
    for found in fit.laws:
        is_loss = found.metric.startswith("loss")
        assert (found.law.irreducible > 0) == is_loss
        assert (found.source_of_irreducible == FITTED) == is_loss


def test_seeds_are_one_point_and_a_measure_of_noise(fit: StudyFit) -> None:
    ends = [run(0, seed=seed, noise=1e-3 * (seed > 0)).final("loss_avg") for seed in range(3)]
    assert law(fit, "loss_avg", PARAMETERS).y[0] == pytest.approx(np.mean(ends))
    noise = next(noise for noise in fit.seeds if noise.metric == "loss_avg")
    assert noise.size == "d6"
    assert noise.relative_deviation == pytest.approx(np.std(ends, ddof=1) / np.mean(ends))


def test_equal_seeds_give_equal_fits_in_any_order_of_runs_and_a_given_irreducible_part_is_that_of_all_laws() -> None:
    known = {"loss_last": 4.4, "loss_avg": 4.9}
    config = quick(irreducible="known")
    fit = analyse(planted_study(5), config, known)
    assert analyse(planted_study(5)[::-1], config, known) == fit
    for metric, variable in itertools.product(LOSSES, (PARAMETERS, COMPUTE)):
        assert law(fit, metric, variable).law.irreducible == known[metric]
        assert law(fit, metric, variable).source_of_irreducible.startswith("known")
    assert [surface.irreducible for surface in fit.parametric] == [4.4, 4.9]


def test_an_unfinished_size_is_in_the_frontier_and_not_in_the_laws_of_size() -> None:
    runs = study(5)
    runs[3] = replace(runs[3], is_finished=False)
    fit = analyse(runs, QUICK)
    assert "d12" not in law(fit, "loss_avg", PARAMETERS).names
    by_compute = law(fit, "loss_avg", COMPUTE)
    assert "d12" in by_compute.names
    # its frontier has three sizes, too few for a third number
    assert by_compute.law.irreducible == law(fit, "loss_avg", PARAMETERS).law.irreducible
    assert by_compute.source_of_irreducible == BORROWED
    assert any("d12" in reason for reason in law(fit, "loss_avg", PARAMETERS).left_out)


def test_a_surface_that_fails_or_tells_no_irreducible_part_is_not_to_be_planned_by(fit: StudyFit) -> None:
    assert not any("Do not plan by it" in note for note in fit.notes)
    assert all(len(surface.held_out) == 2 for surface in fit.parametric)
    failed = replace(fit.parametric[1], held_out=(SurfaceCheck("d30", 5.9, 5.6, 0.3, False),))
    [note] = surface_remarks([failed], QUICK)
    assert "L(N, D) of loss_avg, fitted without" in note and "at d30" in note and note.endswith("Do not plan by it.")
    bound = replace(fit.parametric[0], irreducible=0.0)
    assert surface_remarks([bound], QUICK)[0].endswith("tell no irreducible part. Do not plan by it.")


def test_a_law_that_cannot_be_told_is_absent_with_a_note() -> None:
    """Of a rate that does not change, of a loss that rises with size, and of what four sizes have no room for."""
    runs = [
        replace(
            run,
            metrics={
                **run.metrics,
                "error_avg": np.full(25, 0.9),
                "loss_avg": run.metrics["loss_avg"] + 10 * BILLIONS[index],
            },
        )
        for index, run in enumerate(study(4))
    ]
    fit = analyse(runs, QUICK)
    told = [law.metric for law in fit.laws if law.variable == PARAMETERS]
    assert told == ["loss_last", "error_last"]
    assert any("no law of error_avg by parameters: it does not change" in note for note in fit.notes)
    assert any("no law of loss_avg by parameters" in note for note in fit.notes)
    assert law(fit, "loss_last", PARAMETERS).held_out == ()
    assert any("loss_last by parameters could hold out 0 of the 2 largest sizes" in note for note in fit.notes)


FIXED = {"irreducible": "fixed", "irreducible_last": 4.0, "irreducible_avg": 6.5}


@pytest.mark.parametrize(
    ("runs", "settings", "message"),
    [
        ([], {}, "0 sizes of the study have finished; 3 or more can be fitted"),
        ([replace(run, is_finished=False) for run in study(4)], {}, "0 sizes of the study have finished"),
        (study(4), {"irreducible": "known"}, "irreducible is known, but loss_last of the data's source is not"),
        (study(4), FIXED, r"fixed, 6.5 nats of loss_avg, but [\d.]+ was measured; set a smaller"),
    ],
)
def test_a_study_that_cannot_be_fitted_is_refused(
    runs: list[TrainedSize], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        analyse(runs, quick(**settings))


def test_presets_are_the_published_nats() -> None:
    """An author's 4.5 and 5.0; of the public d16 run, its losses 5.3083 and 6.0534 less eq. 11 at 0.31028 billion."""
    assert PRESETS["paper"] == (4.5, 5.0)
    reducible = (2.0 * 0.31028) ** -0.23, (2.5 * 0.31028) ** -0.20
    assert PRESETS["public-d16"] == pytest.approx((5.3083 - reducible[0], 6.0534 - reducible[1]), abs=0.01)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"irreducible": "guess"}, "fit.irreducible is 'guess'; set one of fitted, paper, public-d16, known, fixed"),
        ({"accounting": "mac"}, "fit.accounting is 'mac'; set one of exact, "),
        ({"counted_parameters": "all"}, "fit.counted_parameters is 'all'; set one of total, eq8"),
        ({"irreducible_avg": 5.0}, "does not use them; set fit.irreducible=fixed"),
        ({"held_out": -1}, "fit.held_out is -1"),
        ({"draws": 10}, "fit.draws is 10; set a finite number from 100"),
        ({"gate": float("nan")}, "fit.gate is nan"),
        ({"warm_up": 1.0}, "fit.warm_up is 1.0; set a finite number from 0 to 0.9"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        FitConfig(**settings)
    assert "\n" not in str(error.value)
