"""The suite runs each benchmark in a process of its own, outlives those that fail, and goes on where it was cut off."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from workers import wait_for

from launchers.bench import suite
from launchers.bench.config import BENCHMARKS, OURS, BenchmarkConfig
from launchers.bench.report import begin_report
from launchers.bench.suite import (
    ChildFailed,
    batch_alone,
    batch_beside,
    plan_suite,
    reason_of,
    run_group,
    run_or_run_less,
    title_of,
)
from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.planning.memory import estimate_memory

CONFIG = BenchmarkConfig(what="suite", repeats=2, against="somewhere")
H200 = 139 * 2**30
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory."
Settings = dict[str, Any]


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=H200))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_every_benchmark_is_in_it_with_settings_that_it_takes(has_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_gpu:
        pretend_a_gpu(monkeypatch)
    planned = plan_suite(CONFIG)
    assert {settings["what"] for settings in planned} == set(BENCHMARKS) - {"suite"}
    assert len({title_of(settings) for settings in planned}) == len(planned)
    for settings in planned:
        BenchmarkConfig(**settings)
    assert {settings["what"] for settings in planned if "against" in settings} == {"train", "sample", "tokenizer"}


def test_each_depth_trains_beside_the_public_code_and_alone_with_more_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_a_gpu(monkeypatch)
    steps = [
        settings
        for settings in plan_suite(CONFIG)
        if settings["what"] == "train" and settings["compile"] and "attention" not in settings
    ]
    alone = {settings["depth"]: settings["batch"] for settings in steps if settings.get("contestants") == OURS}
    beside = {settings["depth"]: settings["batch"] for settings in steps if "against" in settings}
    assert set(alone) == set(beside) == {16, 20, 24, 30} and len(steps) == 8
    assert all(alone[depth] > beside[depth] >= 8 for depth in alone)


def test_the_batches_planned_fit_and_eight_images_more_do_not() -> None:
    def peak(images: int, *, compiles: bool) -> int:
        engine = EngineConfig(precision="bf16", micro_batch=images, compile=compiles)
        return estimate_memory(VARConfig(depth=30), engine, 1).peak.total

    public_state = 16 * VARConfig(depth=30).num_parameters
    for images, room, compiles in (
        (batch_alone(30, H200), 0.85 * H200, True),
        (batch_beside(30, H200), 0.85 * H200 - public_state, False),
    ):
        assert images % 8 == 0 and peak(images, compiles=compiles) <= room < peak(images + 8, compiles=compiles)
    assert 1 <= batch_alone(30, 48 * 2**30) < 8 and batch_alone(30, 2**30) == 1


def test_a_benchmark_that_fails_is_a_row_with_the_reason() -> None:
    (row,) = run_or_run_less({"what": "train", "batch": 1, "depth": 1, "tokenizer_width": 33})
    assert row["name"] == "train d1, 1 images: failed" and row["reason"].startswith("error: tokenizer_width is 33")


def test_ours_is_measured_where_the_public_code_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def run(settings: Settings) -> list[dict[str, Any]]:
        if "against" in settings:
            raise ChildFailed(f"error: the public code in {tmp_path}/VAR stopped: {OUT_OF_MEMORY}")
        return [{"name": "ours", "mfu": 0.5}]

    monkeypatch.setattr(suite, "run_apart", run)
    failed, ours = run_or_run_less({"what": "sample", "depth": 30, "against": "VAR"})
    assert failed["name"].endswith("failed beside the public code")
    assert failed["reason"].startswith("error: the public code in VAR stopped")
    assert str(tmp_path) not in json.dumps([failed, ours])
    assert ours["mfu"] == 0.5 and ours["settings"] == {"what": "sample", "depth": 30}


@pytest.mark.parametrize("others", [{"contestants": OURS}, {"against": "VAR"}])
def test_a_step_that_does_not_fit_is_tried_with_fewer_images(others: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: Settings) -> list[dict[str, Any]]:
        if settings["batch"] > 24:
            raise ChildFailed(OUT_OF_MEMORY)
        return [{"name": "ours"}]

    monkeypatch.setattr(suite, "run_apart", run)
    rows = run_or_run_less({"what": "train", "depth": 30, "batch": 48} | others)
    assert [row["settings"]["batch"] for row in rows] == [48, 32, 24]
    assert rows[-1]["name"].endswith("d30, 24 images: ours") and "out of memory" in rows[0]["reason"]
    assert rows[-1]["settings"].items() >= others.items()


def test_what_hangs_is_ended_with_all_that_it_has_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "MOST_SECONDS", 1)
    started = tmp_path / "started"
    with pytest.raises(ChildFailed, match="was not done after 1 s"):
        run_group(["sh", "-c", f"sleep 99 & echo $! > {started}; wait"])
    wait_for(lambda: not Path(f"/proc/{started.read_text().strip()}").exists())


def test_the_reason_is_the_last_line_that_names_an_error() -> None:
    assert reason_of(f"Traceback\n  a line\n{OUT_OF_MEMORY}\n[rank0] Warning: process group\n") == OUT_OF_MEMORY
    assert reason_of("error: one line\n") == "error: one line"
    assert reason_of("Killed\n") == "Killed" and reason_of("") == ""


def test_a_suite_that_was_cut_short_goes_on_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [{"what": "train", "depth": 3}, {"what": "data"}]
    monkeypatch.setattr(suite, "plan_suite", lambda config: planned)
    config = BenchmarkConfig(what="suite", out=str(tmp_path / "made" / "b.json"))
    ran: list[Settings] = []

    def run_until(most: int) -> None:
        def run(settings: Settings) -> list[dict[str, Any]]:
            if len(ran) == most:
                raise KeyboardInterrupt
            ran.append(settings)
            return [{"name": "a"}]

        monkeypatch.setattr(suite, "run_apart", run)

    run_until(1)
    with pytest.raises(KeyboardInterrupt):
        suite.benchmark_suite(config, begin_report(config, []))
    run_until(2)
    rows = suite.benchmark_suite(config, begin_report(config, []))
    assert ran == planned and [row["name"] for row in rows] == ["train d3: a", "data: a"]
    assert json.loads(Path(config.out).read_text())["rows"] == rows
