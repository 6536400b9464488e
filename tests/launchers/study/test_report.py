"""The report: what it says follows the runs and the fits, also where they say something unwelcome."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from study_examples import planted_fit, planted_run, planted_runs, planted_study, study_config, write_run
from tiny import command

from launchers.study import report as study_report
from launchers.study.config import StudyConfig
from launchers.study.fitting import FittedStudy, read_fit
from launchers.study.reading import Source, Study
from launchers.study.report import FIGURE_5, FIGURE_6, REPORT, compose_report, launch_report, not_shown, shown
from training.laws.study_fit import COMPUTE, StudyFit
from training.tracking.record import TrackingConfig

RUNS = planted_runs((6, 8, 10, 12), noise=1e-4)
STUDY, FIT = planted_study(RUNS), planted_fit(RUNS)
UNTRACKED = TrackingConfig(mlflow=False)


def with_model(study: Study, **changes: object) -> Study:
    """The study as if its models had been others."""
    runs = [replace(run, config=replace(run.config, model=replace(run.config.model, **changes))) for run in study.runs]
    return replace(study, runs=tuple(runs))


def test_the_report_has_all_that_a_reader_needs_to_judge_the_laws() -> None:
    report = compose_report(FittedStudy(STUDY, FIT), study_config(Path("runs/mine"), RUNS))
    assert report.startswith("# Scaling study mine\n")
    for wanted in (
        *("y = E + (beta x)^alpha", "not per second", "18,492,580", "15,925,248", "fig5.png", "fig6.png"),
        *("runs test", "The gate", "2.50%", "How the exponent moves with E", "three estimators", "L(N, D)"),
        *("Noise between seeds", "Training and validation", "A note of the fit.", "points.csv"),
    ):
        assert wanted in report, wanted
    assert report.index("## What this shows") < report.index("## What this does not show") < report.index("points.csv")


def test_the_limits_are_those_of_the_runs() -> None:
    said = " ".join(not_shown(STUDY))
    assert "below 18,492,580 or above 133,186,960 parameters" in said
    assert f"{max(run.compute('exact')[-1] for run in RUNS):.6g} PFLOP" in said
    assert "seen up to 200.0 times" in said and "Learning rates decay" in said and "differ between sizes" not in said
    metrics = {name: values[:1] for name, values in RUNS[0].metrics.items()}
    once = replace(RUNS[0], images=np.array([768]), metrics=metrics)
    assert "laws in tokens are of repeated" not in " ".join(not_shown(planted_study([once])))
    assert "not the paper's data" not in said
    last = not_shown(with_model(STUDY, num_classes=10, patch_nums=(1, 2, 4)))[-1]
    assert "not the paper's data (10 classes, 21 tokens an image)" in last


@pytest.mark.parametrize("is_new", [True, False])
def test_report_writes_its_files_and_a_new_fit_and_hands_them_to_mlflow_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    published: list[StudyConfig] = []
    monkeypatch.setattr(study_report, "publish", published.append)
    monkeypatch.setattr(study_report, "fitted_study", lambda config: FittedStudy(STUDY, FIT, is_new))
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"drawn"))
    config = study_config(tmp_path, RUNS, tracking=TrackingConfig(mlflow=is_new))
    launch_report(command(config))
    written = {REPORT, FIGURE_5, FIGURE_6} | ({"fit.json", "points.csv"} if is_new else set())
    assert {path.name for path in tmp_path.iterdir()} == written
    assert published == [config] * is_new
    assert not is_new or read_fit(tmp_path) == FIT


def test_a_study_without_a_law_in_parameters_has_a_report_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = replace(FIT, laws=tuple(law for law in FIT.laws if law.variable == COMPUTE))
    monkeypatch.setattr(study_report, "fitted_study", lambda config: FittedStudy(STUDY, fit))
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"drawn"))
    (tmp_path / FIGURE_5).write_bytes(b"of an earlier report")
    launch_report(command(study_config(tmp_path, RUNS, tracking=UNTRACKED)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [FIGURE_6, REPORT]
    text = (tmp_path / REPORT).read_text()
    assert FIGURE_5 not in text and FIGURE_6 in text and "No law was found; the notes say why." in text
    bare = FittedStudy(STUDY, replace(FIT, laws=(), frontiers=(), parametric=(), seeds=()))
    assert "18,492,580" in compose_report(bare, study_config(Path("mine"), RUNS)), "without laws the rest is shown"
    assert f"no {FIGURE_5}, since there is no law by parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_a_report_is_made_from_run_folders_alone(tmp_path: Path) -> None:
    runs = planted_runs(noise=1e-3)
    for run in runs:
        write_run(tmp_path, run)
    launch_report(command(study_config(tmp_path, runs, tracking=UNTRACKED)))
    assert all((tmp_path / name).stat().st_size > 10_000 for name in (REPORT, FIGURE_5, FIGURE_6))
    report = (tmp_path / REPORT).read_text()
    assert "loss_last falls with every size" in report and "nan" not in report


def test_a_dry_run_reads_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, planted_run(6))
    launch_report(command(study_config(tmp_path, [planted_run(6), planted_run(8)]), dry_run=True))
    assert "not there yet: d8-seed0; would write report.md" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["d6-seed0"]


ENDS = {"loss_last": min(run.metrics["loss_last"].min() for run in RUNS), "loss_avg": 1.0}
WORSE = replace(RUNS[2], metrics=RUNS[2].metrics | {"loss_avg": RUNS[2].metrics["loss_avg"] + 0.5})
FAILED = replace(FIT.laws[0], held_out=(replace(FIT.laws[0].held_out[0], passed=False, share=0.25),))
LEAKING = Source(ENDS | {"loss_last": ENDS["loss_last"] + 1e-6})


@pytest.mark.parametrize(
    ("study", "fit", "said"),
    [
        (STUDY, FIT, "loss_avg falls with every size"),
        (planted_study([WORSE if run is RUNS[2] else run for run in RUNS]), FIT, "loss_avg does NOT fall with every"),
        (STUDY, replace(FIT, laws=(FAILED, *FIT.laws[1:])), "Against parameters, 3 of 4 predictions"),
        (replace(STUDY, source=Source(ENDS)), FIT, "loss_last lies below the entropy"),
        (replace(STUDY, source=LEAKING), FIT, "loss_last of d12-seed0 went BELOW the entropy"),
        (replace(STUDY, source=Source(ENDS, LEAKING.entropy)), FIT, "went BELOW what the source itself loses"),
        (replace(STUDY, source=Source({"loss_avg": 5.05})), FIT, "fitted to loss_avg, 5, agrees with"),
        (replace(STUDY, source=Source({"loss_avg": 4.8})), FIT, "does NOT agree with the entropy, 4.8"),
    ],
)
def test_what_the_report_shows_follows_the_runs_and_the_fit(study: Study, fit: StudyFit, said: str) -> None:
    assert any(said in sentence for sentence in shown(study, fit))
