"""What is measured can be asked for by name, and goes to the screen and to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import command

from launchers import benchmark
from launchers.benchmark_config import BENCHMARKS, BenchmarkConfig
from launchers.benchmark_suite import plan_suite, title_of


def test_every_benchmark_that_can_be_asked_for_is_there() -> None:
    assert (*benchmark.BENCHMARKED, "suite") == BENCHMARKS


def test_rows_go_to_the_screen_and_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark.BENCHMARKED, "data", lambda config: [{"name": "a row", "peak_bytes": 2**30}])
    benchmark.launch(command(BenchmarkConfig(what="data", out=str(tmp_path / "b.json"))))
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["rows"] == [{"name": "a row", "peak_bytes": 2**30}] and report["settings"]["depth"] == 8
    assert report["finished"]
    assert "a row" in capsys.readouterr().out


def test_a_dry_run_of_the_suite_names_its_benchmarks_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.launch(command(BenchmarkConfig(what="suite"), dry_run=True))
    titles = [title_of(settings) for settings in plan_suite(BenchmarkConfig(what="suite"))]
    assert capsys.readouterr().out.splitlines()[1:] == titles


def test_the_suite_goes_to_a_file_when_all_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "benchmark_suite", lambda config, report: [{"name": report["settings"]["what"]}])
    benchmark.launch(command(BenchmarkConfig(what="suite", out=str(tmp_path / "b.json"))))
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["rows"] == [{"name": "suite"}] and report["finished"]
