"""The answer of `plan` and the table of `paper`, as a reader sees them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from study_examples import PLANTED, planted_fit, planted_runs, planted_study, study_config
from tiny import command

from launchers.study import plan as study_plan
from launchers.study.config import PlanConfig
from launchers.study.fitting import FittedStudy
from launchers.study.plan import allocate_with, budget, launch_paper, launch_plan, plan_lines, warnings
from launchers.study.reading import Source
from models.var import VARConfig
from training.flops import training_flops
from training.laws.study_fit import ParametricFit


def test_a_budget_is_given_in_pflop_or_in_gpu_days_and_never_twice() -> None:
    assert budget(PlanConfig(pflop=12.5)) == 12.5
    assert budget(PlanConfig(gpu_days=2, gpu_tflops=1000, utilisation=0.5)) == pytest.approx(2 * 86_400 * 0.5)
    for pflop in (-5.0, 1e300, math.inf, math.nan):
        with pytest.raises(ValueError, match="the budget is .* PFLOP; accepted: above 0, up to 1e"):
            budget(PlanConfig(pflop=pflop))
    with pytest.raises(ValueError, match="both plan.pflop and plan.gpu_days are given"):
        budget(PlanConfig(pflop=1, gpu_days=1))
    with pytest.raises(ValueError, match="no budget is given; write plan.pflop=NUMBER or plan.gpu_days=NUMBER"):
        budget(PlanConfig())


def test_a_plan_by_a_law_that_failed_or_below_the_entropy_comes_with_a_warning() -> None:
    runs = planted_runs()
    fit, study = planted_fit(runs), planted_study(runs)
    law = fit.parametric[0]
    found = allocate_with(law, study, fit, PlanConfig(pflop=1e5), 1e5)
    assert warnings(found, law, FittedStudy(study, fit)) == []
    above_best = replace(study, source=Source(entropy={law.metric: found.best.loss + 1e-6}))
    [impossible] = warnings(found, law, FittedStudy(above_best, fit))
    assert f"d{found.best.depth}" in impossible and "below the source's entropy" in impossible
    remark = f"L(N, D) of {law.metric} has E = 0, the bound"
    failed = replace(fit, notes=(remark, "L(N, D) of another is good"))
    assert warnings(found, law, FittedStudy(study, failed)) == [remark]


def test_the_plan_spends_the_budget_on_the_size_that_the_law_prefers() -> None:
    runs = planted_runs()
    study, fit, config = planted_study(runs), planted_fit(runs), PlanConfig(pflop=1e5)
    found = allocate_with(fit.parametric[0], study, fit, config, 1e5)
    irreducible, factor, exponent, token_factor, token_exponent = PLANTED["loss_avg"]
    models = [VARConfig(depth) for depth in range(1, 41)]
    billions = np.array([model.num_parameters for model in models]) / 1e9
    tokens = np.array([1e20 / training_flops(model) * 680 for model in models]) / 1e9
    losses = irreducible + factor * billions**-exponent + token_factor * tokens**-token_exponent
    assert found.best.depth == 1 + losses.argmin() and found.best.loss == pytest.approx(losses.min())
    lines = plan_lines(found, shows_all=False)
    assert lines[0].startswith(f"by loss_avg: train d{found.best.depth} on {found.best.images:,} images")
    shown = [line.split()[0] for line in lines[2:7]]
    assert shown == [f"d{depth}" for depth in range(found.best.depth - 2, found.best.depth + 3)]
    found = allocate_with(fit.parametric[0], study, fit, PlanConfig(pflop=1e5, depths=(40, 2, 20)), 1e5)
    lines = plan_lines(found, shows_all=True)
    assert [line.split()[0] for line in lines[2:5]] == ["d2", "d20", "d40"]
    assert lines[2].endswith("parameters, tokens") and lines[3].endswith(" -")


def test_plan_answers_for_every_law_and_refuses_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = planted_runs()
    fit = planted_fit(runs)
    other: ParametricFit = replace(fit.parametric[0], metric="loss_last", irreducible=4.0)
    fits = [replace(fit, parametric=(fit.parametric[0], other)), replace(fit, parametric=())]
    monkeypatch.setattr(study_plan, "fitted_study", lambda config: FittedStudy(planted_study(runs), fits.pop(0)))
    asked = command(study_config(tmp_path, runs, plan=PlanConfig(pflop=1e5)))
    launch_plan(asked)
    said = capsys.readouterr().out
    assert "budget: 100,000 PFLOP" in said and "by loss_avg: train" in said and "by loss_last: train" in said
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    with pytest.raises(ValueError, match="too few for L.N, D.*train more sizes"):
        launch_plan(asked)


def test_the_papers_laws_come_with_what_does_not_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_paper(command(study_config(tmp_path, planted_runs())))
    said = capsys.readouterr().out
    assert "(2.5 N)^-0.2" in said and "(1.5e-05 C)^-0.16" in said
    assert "swapped" in said and "not training FLOPs" in said
    assert "286,434" in said and "eq. 21 is right as printed" in said  # Appendix B
    d30 = next(line.split() for line in said.splitlines() if line.startswith("d30"))
    assert float(d30[3]) / float(d30[1]) > 100  # as labelled the last scale's error and loss name other computes
