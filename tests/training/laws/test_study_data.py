"""The measured run of a study: what it has spent, and what it ended with."""

from __future__ import annotations

import pytest
from study_examples import planted_run

from models.var import VARConfig
from training.flops import ACCOUNTINGS, training_flops
from training.laws.study_data import METRICS


def test_compute_is_a_total_that_grows_with_the_images() -> None:
    run = planted_run(6)
    spent = run.compute("exact")
    assert spent == pytest.approx(run.images * (training_flops(VARConfig(depth=6)) / 1e15))
    assert set(run.flops_per_image) == set(ACCOUNTINGS)
    assert all(run.compute(name).shape == run.images.shape for name in ACCOUNTINGS)


def test_the_final_value_is_the_last_one_measured() -> None:
    run = planted_run(6)
    assert {name: run.final(name) for name in METRICS} == {name: run.metrics[name][-1] for name in METRICS}
