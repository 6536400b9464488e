"""From runs to curves: what is averaged, what is left out, and that it is said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planted import BILLIONS, run

from training.laws.study_data import StudyCurves, TrainedSize, study_curves
from training.laws.study_fit import FitConfig

RULES = FitConfig(warm_up=0.0, untrained=1.0)


def curves(*runs: TrainedSize, **changes: object) -> StudyCurves:
    return study_curves(runs, replace(RULES, **changes))


def with_values(size: TrainedSize, metric: str, at: int, value: float) -> TrainedSize:
    values = size.metrics[metric].copy()
    values[at] = value
    return replace(size, metrics={**size.metrics, metric: values})


def test_sizes_come_smallest_first_and_seeds_are_averaged_where_all_were_evaluated() -> None:
    first, second = run(1, seed=0, noise=1e-2), run(1, seed=5, noise=1e-2)
    half = {name: values[::2] for name, values in second.metrics.items()}
    small, large = curves(run(4), second, first).sizes
    assert (small.name, large.name) == ("d8", "d14")
    assert len(curves(first, replace(second, images=second.images[::2], metrics=half)).sizes[0].pflop) == 13
    assert small.metrics["loss_avg"] == pytest.approx((first.metrics["loss_avg"] + second.metrics["loss_avg"]) / 2)
    assert small.ends["loss_avg"] == (first.final("loss_avg"), second.final("loss_avg"))
    assert small.end("loss_avg") == pytest.approx((first.final("loss_avg") + second.final("loss_avg")) / 2)


def test_an_unfinished_seed_is_not_averaged_and_an_unfinished_size_has_no_end() -> None:
    whole, part = run(1), replace(run(1, seed=1, noise=0.1), is_finished=False)
    assert curves(whole, part).sizes[0].ends["loss_avg"] == (whole.final("loss_avg"),)
    alone = curves(part)
    assert not alone.sizes[0].is_finished
    assert len(alone.sizes[0].pflop) == 25
    assert "d8 is not finished" in alone.notes[0]


def test_warm_up_is_left_out_once_for_all_sizes() -> None:
    found = curves(run(0), run(1), warm_up=0.021)
    for size in found.sizes:
        assert size.tokens[0] >= 0.02 * size.tokens[-1]
    assert len(found.left_out) == 1 and found.left_out[0].startswith("d6, d8: ")


def test_warm_up_is_a_share_of_the_whole_run_not_of_what_has_been_done() -> None:
    whole = replace(run(0), planned_images=int(run(0).images[-1]))
    half = replace(
        whole, is_finished=False, images=whole.images[:12], metrics={m: v[:12] for m, v in whole.metrics.items()}
    )
    done, under_way = (curves(each, warm_up=0.021).sizes[0] for each in (whole, half))
    assert under_way.tokens[0] == done.tokens[0]


def test_models_that_know_nothing_are_left_out() -> None:
    ceiling = float(run(0).metrics["loss_avg"][0]) / 0.95
    found = curves(replace(run(0), untrained_loss=ceiling), untrained=0.9)
    assert found.sizes[0].metrics["loss_avg"].max() <= 0.9 * ceiling
    assert 0 < len(found.sizes[0].pflop) < 25
    assert "untrained" in found.left_out[0]


def test_a_curve_has_the_units_that_are_asked_for() -> None:
    (size,), (other,) = curves(run(3)).sizes, curves(run(3), accounting="six_nt", counted_parameters="eq8").sizes
    assert (size.name, size.parameters) == ("d12", pytest.approx(BILLIONS[3]))
    assert size.tokens == pytest.approx(run(3).images * 680 / 1e9)
    assert size.pflop == pytest.approx(6 * BILLIONS[3] * 1e9 * run(3).images * 680 / 1e15)
    assert other.pflop == pytest.approx(size.pflop * 7 / 6) and other.parameters == pytest.approx(size.parameters * 0.9)


@pytest.mark.parametrize(("at", "value"), [(4, np.nan), (4, np.inf), (4, 0.0), (-1, np.nan)])
def test_an_evaluation_that_is_no_loss_is_left_out_and_named(at: int, value: float) -> None:
    found = curves(with_values(run(2), "error_last", at, value))
    assert len(found.sizes[0].pflop) == 24 and "d10-seed0: 1 of 25 evaluations" in found.left_out[0]
    assert found.sizes[0].is_finished == (at != -1), "without its last evaluation a run has no end"


def test_evaluations_that_go_back_are_left_out_and_an_end_above_the_lowest_is_kept() -> None:
    images = run(2).images.copy()
    images[5], images[9] = images[4], images[2]
    found = curves(replace(with_values(run(2), "loss_avg", -1, 9.0), images=images))
    assert len(found.sizes[0].pflop) == 23 and (np.diff(found.sizes[0].pflop) > 0).all()
    assert found.sizes[0].end("loss_avg") == 9 and "loss_avg ends" in found.notes[0]
