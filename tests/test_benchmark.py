"""What is measured can be asked for by name, and goes to the screen and to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import command

from launchers import benchmark
from launchers.benchmark_config import BENCHMARKS, BenchmarkConfig


def test_every_benchmark_that_can_be_asked_for_is_there() -> None:
    assert tuple(benchmark.BENCHMARKED) == BENCHMARKS


def test_rows_go_to_the_screen_and_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark.BENCHMARKED, "data", lambda config: [{"name": "a row", "peak_bytes": 2**30}])
    benchmark.launch(command(BenchmarkConfig(what="data", out=str(tmp_path / "b.json"))))
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["rows"] == [{"name": "a row", "peak_bytes": 2**30}] and report["settings"]["depth"] == 8
    assert "a row" in capsys.readouterr().out
