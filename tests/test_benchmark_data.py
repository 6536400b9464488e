"""The data benchmark reads real shards, all of them, by each of its contestants."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import Study

from launchers.benchmark_config import BenchmarkConfig
from launchers.benchmark_data import benchmark_data, code_calls, image_calls


def test_reading_is_timed_beside_what_others_do(study: Study) -> None:
    config = BenchmarkConfig(what="data", folder=str(study.folder / "images/train"), repeats=1)
    rows = {row["name"]: row for row in benchmark_data(config)}
    assert rows["images, as a run reads them, one core"]["ratio"] == 1.0
    assert "images, webdataset and Pillow, 2 processes" in rows and "images, preads alone, one core" in rows


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_every_call_handles_the_whole_data_set(study: Study, tmp_path: Path, kind: str) -> None:
    folder = str(study.folder / kind / "train")
    calls = code_calls(folder) if kind == "codes" else image_calls(folder, tmp_path / "files")
    handled = {name: call() for name, call in calls.items()}
    assert len(handled) > 6 and min(handled.values()) >= 12, handled
