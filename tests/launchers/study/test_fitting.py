"""fit.json and points.csv: nothing is lost on the way there and back, and an old fit is not taken for a new one."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from planted import quick
from study_examples import PLANTED, planted_fit, planted_run, planted_runs, planted_study, study_config, write_run
from tiny import command

from launchers.study import fitting as study_fitting
from launchers.study.config import StudyConfig
from launchers.study.fitting import (
    FIT,
    POINTS,
    FittedStudy,
    fitted_study,
    launch_fit,
    points_csv,
    read_fit,
    summary,
    write_fit,
)
from training.laws.study_data import METRICS, TrainedSize
from training.laws.study_fit import PARAMETERS, FitConfig, StudyFit


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[FitConfig]:
    """Every fit that is made, by its config; the fit itself is written by hand."""
    made: list[FitConfig] = []

    def analyse(runs: list[TrainedSize], config: FitConfig, known: dict[str, float]) -> StudyFit:
        made.append(config)
        return planted_fit(runs)

    monkeypatch.setattr(study_fitting, "analyse", analyse)
    return made


def written_study(folder: Path) -> StudyConfig:
    """Three sizes in their run folders."""
    runs = [planted_run(6), planted_run(8), planted_run(10)]
    for run in runs:
        write_run(folder, run)
    return study_config(folder, runs)


def test_a_fit_is_read_back_to_the_last_digit_and_nan_as_null(tmp_path: Path) -> None:
    runs = planted_runs((6, 8, 10), noise=1e-3)
    fit = planted_fit(runs)
    write_fit(study_config(tmp_path, runs), FittedStudy(planted_study(runs), fit))
    assert read_fit(tmp_path) == fit
    assert len((tmp_path / FIT).read_text().splitlines()) < 2500  # people read it: an array of numbers is one line
    odd = replace(fit, laws=(replace(fit.laws[0], pearson=math.nan, irreducible_interval=None),))
    write_fit(study_config(tmp_path, runs), FittedStudy(planted_study(runs), odd))
    (law,) = read_fit(tmp_path).laws
    assert math.isnan(law.pearson) and law.irreducible_interval is None and law.y == fit.laws[0].y
    assert json.loads((tmp_path / FIT).read_text())["fit"]["laws"][0]["pearson"] is None


def test_a_fit_is_made_again_when_points_settings_or_entropy_are_others(
    tmp_path: Path, fits: list[FitConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """The data's source may have been drawn anew: its entropy, a fit's irreducible part, is then another one."""
    source = tmp_path / "source.json"
    source.write_text('{"entropy_last": 1.25, "entropy_avg": 1.5}')
    config = replace(written_study(tmp_path), known_entropy=str(source))
    first = fitted_study(config)
    assert first.is_new and not (tmp_path / FIT).exists()
    write_fit(config, first)
    assert fitted_study(config).fit == first.fit and not fitted_study(config).is_new and len(fits) == 1
    before = (tmp_path / FIT).read_bytes()
    assert fitted_study(replace(config, fit=replace(config.fit, accounting="six_nt"))).is_new
    source.write_text('{"entropy_last": 1.25, "entropy_avg": 1.75}')
    assert fitted_study(config).is_new
    write_run(tmp_path, planted_run(12))
    assert fitted_study(replace(config, sizes=(*config.sizes, "configs/d12.yaml"))).is_new
    assert [fit.accounting for fit in fits] == ["exact", "six_nt", "exact", "exact"]
    assert (tmp_path / FIT).read_bytes() == before
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / FIT}: was made with {change} (give the same settings here to keep it); fitted anew"
        for change in ("fit.accounting=exact, not six_nt", "known.loss_avg=1.5, not 1.75")
    ] + [f"{tmp_path / FIT}: is of other points; fitted anew"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: "{", "is not valid JSON"),
        (lambda text: '{"fit": 3}', ""),
        (lambda text: text.replace('"schema": ', '"schema": 7'), f"schema is 7{StudyFit.schema}, accepted: "),
        (lambda text: text.replace('"laws": ', '"lore": '), "StudyFit has laws, "),
    ],
)
def test_a_damaged_fit_or_one_of_another_version_is_named_and_made_again(
    tmp_path: Path, fits: list[FitConfig], capsys: pytest.CaptureFixture[str], damage: Callable[[str], str], words: str
) -> None:
    config = written_study(tmp_path)
    with pytest.raises(FileNotFoundError, match="make it with scaling_study.py fit"):
        read_fit(tmp_path)
    first = fitted_study(config)
    write_fit(config, first)
    (tmp_path / FIT).write_text(damage((tmp_path / FIT).read_text()))
    with pytest.raises(ValueError, match=f"fit.json: is no fit of this version .{words}.*make it anew: scaling_study"):
        read_fit(tmp_path)
    assert fitted_study(config).fit == first.fit and len(fits) == 2
    [said] = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{tmp_path / FIT}: is no fit of this version ({words}") and said.endswith("; fitted anew")


def test_every_point_is_in_the_csv_with_all_its_digits() -> None:
    runs = planted_runs((6, 8), noise=1e-3)
    rows = list(csv.DictReader(points_csv(planted_study(runs)).decode().splitlines()))
    assert len(rows) == sum(len(run.images) for run in runs)
    last = rows[len(runs[0].images) - 1]
    assert last["run"] == "d6-seed0" and int(last["tokens"]) == int(last["images"]) * 680
    assert [float(last[metric]) for metric in METRICS] == [runs[0].final(metric) for metric in METRICS]
    assert float(last["pflop_six_nt"]) == runs[0].compute("six_nt")[-1]


def test_fit_says_what_was_read_and_found_and_a_dry_run_writes_nothing(
    tmp_path: Path, fits: list[FitConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [planted_run(6), planted_run(8)]
    config = study_config(tmp_path, [*runs, planted_run(12)])
    for run in runs:
        write_run(tmp_path, run)
    launch_fit(command(config, dry_run=True))
    assert "2 runs with 50 evaluations; not there yet: d12-seed0" in capsys.readouterr().out
    assert not fits and not (tmp_path / FIT).exists()
    launch_fit(command(config))
    said = capsys.readouterr().out
    assert said.count("exponent") == 8 and "note: A note of the fit." in said and "gate passed" in said
    assert (tmp_path / FIT).is_file() and (tmp_path / POINTS).is_file()
    fit = planted_fit(runs)
    point = replace(fit.laws[0].held_out[0], share=0.02, share_of_gain=0.5, passed=False)
    failed = replace(fit, laws=(replace(fit.laws[0], held_out=(point,)),))
    assert "gate FAILED (2.00% of the reducible part, 50% of the gain)" in summary(failed)[0]


def test_planted_laws_are_found_from_the_run_folders(tmp_path: Path) -> None:
    """From the folders to the law, with nothing in between made by hand."""
    runs = [planted_run(depth) for depth in (6, 8, 10, 14, 20, 30)]
    for run in runs:
        write_run(tmp_path, run)
    found = fitted_study(study_config(tmp_path, runs, fit=quick()))
    law = next(law for law in found.fit.laws if (law.metric, law.variable) == ("loss_last", PARAMETERS))
    irreducible, _, exponent, token_factor, token_exponent = PLANTED["loss_last"]
    rest = irreducible + token_factor * (runs[0].images[-1] * 680 / 1e9) ** -token_exponent
    assert law.law.exponent == pytest.approx(-exponent, rel=0.02)
    assert law.law.irreducible == pytest.approx(rest, rel=0.005)
