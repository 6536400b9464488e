"""The data benchmark reads real shards, all of them, by each of its contestants."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import Study, open_codes, pack_codes

from launchers.bench.config import BenchmarkConfig
from launchers.bench.data import benchmark_data, bytes_of, code_calls, image_calls
from launchers.bench.models import code_shards
from models.var import VARConfig


def test_reading_is_timed_beside_what_others_do(study: Study) -> None:
    config = BenchmarkConfig(what="data", folder=str(study.folder / "images/train"), repeats=1)
    rows = {row["name"]: row for row in benchmark_data(config)}
    assert rows["images, as a run reads them, one core"]["ratio"] == 1.0
    assert "images, webdataset and Pillow, 2 processes" in rows and "images, preads alone, one core" in rows
    without = [name for name, row in rows.items() if "bandwidth_share" not in row]
    assert without == ["images, decoded and no more, one core"]


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_every_call_handles_the_whole_data_set(study: Study, tmp_path: Path, kind: str) -> None:
    folder = str(study.folder / kind / "train")
    calls = code_calls(folder) if kind == "codes" else image_calls(folder, tmp_path / "files")
    handled = {name: call() for name, (call, _) in calls.items()}
    assert len(handled) > 6 and min(handled.values()) >= 12, handled


def test_bytes_are_those_of_a_sample_in_its_shard_and_in_tensors(tmp_path: Path) -> None:
    model = VARConfig(depth=1, patch_nums=(1, 2), vocab_size=64, num_classes=3)
    read, narrow, wide = bytes_of(code_shards(model, tmp_path, 6))
    record = 2 + 8  # a label, and five codes of 12 bits
    assert (read, narrow, wide) == (record, 5 * 2 + 8, 5 * 8 + 8)
    assert bytes_of(open_codes(pack_codes(tmp_path / "views")))[0] == record  # of three views one
