"""The benchmark compares in turns and reports medians; what it times is the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Study, command

from launchers import benchmark
from launchers.config import BenchmarkConfig


def test_reading_is_timed_with_and_without_checks(study: Study, tmp_path: Path) -> None:
    folder, out = str(study.folder / "images/train"), str(tmp_path / "b.json")
    config = BenchmarkConfig(what="data", folder=folder, repeats=2, out=out)
    benchmark.launch(command(config))
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert rows["images, checked"]["ratio"] == 1.0 and "images, webdataset in order" in rows
    for row in rows.values():
        assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]


def test_calls_are_timed_in_turns_after_one_to_warm_up() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or 1 for name in "ab"}
    rows = benchmark.time_in_turns(calls, repeats=3)
    assert "".join(order) == "abababab" and [row["name"] for row in rows] == ["a", "b"]


def test_unknown_benchmarks_are_refused() -> None:
    with pytest.raises(ValueError, match="accepted: data, attention"):
        BenchmarkConfig(what="everything")
