"""The data benchmark reads real shards."""

from __future__ import annotations

from tiny import Study

from launchers.benchmark_data import benchmark_data
from launchers.config import BenchmarkConfig


def test_reading_is_timed_with_and_without_checks(study: Study) -> None:
    config = BenchmarkConfig(what="data", folder=str(study.folder / "images/train"), repeats=2)
    rows = {row["name"]: row for row in benchmark_data(config)}
    assert rows["images, checked"]["ratio"] == 1.0 and "images, webdataset in order" in rows
