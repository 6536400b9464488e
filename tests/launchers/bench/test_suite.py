"""The suite runs each benchmark in a process of its own, outlives those that fail, and goes on where it was cut off."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from workers import wait_for

from launchers.bench import suite as benchmark_suite
from launchers.bench.config import BENCHMARKS, OURS, BenchmarkConfig
from launchers.bench.report import begin_report
from launchers.bench.suite import (
    ChildFailed,
    batch_alone,
    batch_beside,
    cpu_suite,
    gpu_suite,
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


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to plan for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=H200))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of what was run, one row each; nothing is measured."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(benchmark_suite, "run_apart", lambda settings: made.append(settings) or [{"name": "a"}])
    return made


def test_every_benchmark_is_in_it_with_settings_that_it_takes(card: None) -> None:
    for planned in (cpu_suite(CONFIG), gpu_suite(CONFIG)):
        assert {settings["what"] for settings in planned} == set(BENCHMARKS) - {"suite"}
        assert len({title_of(settings) for settings in planned}) == len(planned)
        for settings in planned:
            BenchmarkConfig(**settings)
    beside = {settings["what"] for settings in gpu_suite(CONFIG) if "against" in settings}
    assert beside == {"train", "sample", "tokenizer"}


def test_each_depth_trains_beside_the_public_code_and_alone_with_more_images(card: None) -> None:
    steps = [
        settings
        for settings in gpu_suite(CONFIG)
        if settings["what"] == "train" and settings["compile"] and "attention" not in settings
    ]
    alone = {settings["depth"]: settings["batch"] for settings in steps if settings.get("contestants") == OURS}
    beside = {settings["depth"]: settings["batch"] for settings in steps if "against" in settings}
    assert set(alone) == set(beside) == {16, 20, 24, 30} and len(steps) == 8
    assert all(alone[depth] > beside[depth] >= 8 for depth in alone)


@pytest.mark.parametrize("depth", [16, 30])
def test_the_batches_planned_fit_and_eight_images_more_do_not(depth: int) -> None:
    def peak(images: int, *, compiles: bool) -> int:
        engine = EngineConfig(precision="bf16", micro_batch=images, compile=compiles)
        return estimate_memory(VARConfig(depth=depth), engine, 1).peak.total

    public_state = 16 * VARConfig(depth=depth).num_parameters
    for images, room, compiles in (
        (batch_alone(depth, H200), 0.85 * H200, True),
        (batch_beside(depth, H200), 0.85 * H200 - public_state, False),
    ):
        assert images % 8 == 0 and peak(images, compiles=compiles) <= room < peak(images + 8, compiles=compiles)


def test_what_fits_less_than_eight_images_has_as_many_as_fit() -> None:
    assert 1 <= batch_alone(30, 48 * 2**30) < 8 and batch_alone(30, 2**30) == 1


def test_a_benchmark_that_fails_is_a_row_that_says_why() -> None:
    settings = {"what": "train", "batch": 1, "depth": 1, "tokenizer_width": 33}
    rows = run_or_run_less(settings)
    assert len(rows) == 1 and rows[0]["name"] == "train d1, 1 images: failed"
    assert rows[0]["reason"].startswith("error: tokenizer_width is 33")


def test_ours_is_measured_where_the_public_code_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def run(settings: dict[str, Any]) -> list[dict[str, Any]]:
        if "against" in settings:
            raise ChildFailed(f"error: the public code in {tmp_path}/VAR stopped: {OUT_OF_MEMORY}")
        return [{"name": "ours", "mfu": 0.5}]

    monkeypatch.setattr(benchmark_suite, "run_apart", run)
    failed, ours = run_or_run_less({"what": "sample", "depth": 30, "against": "VAR"})
    assert failed["name"].endswith("failed beside the public code")
    assert failed["reason"].startswith("error: the public code in VAR stopped")
    assert str(tmp_path) not in json.dumps([failed, ours])
    assert ours["mfu"] == 0.5 and ours["settings"] == {"what": "sample", "depth": 30}


@pytest.mark.parametrize("others", [{"contestants": OURS}, {"against": "VAR"}])
def test_a_step_that_does_not_fit_is_tried_with_fewer_images(
    others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the public code too: a ratio at fewer images says more than none."""

    def run(settings: dict[str, Any]) -> list[dict[str, Any]]:
        if settings["batch"] > 24:
            raise ChildFailed(OUT_OF_MEMORY)
        return [{"name": "ours"}]

    monkeypatch.setattr(benchmark_suite, "run_apart", run)
    rows = run_or_run_less({"what": "train", "depth": 30, "batch": 48} | others)
    assert [row["settings"]["batch"] for row in rows] == [48, 32, 24]
    assert rows[-1]["name"].endswith("d30, 24 images: ours") and "out of memory" in rows[0]["reason"]
    assert rows[-1]["settings"].items() >= others.items()


def test_what_hangs_is_ended_with_all_that_it_has_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark_suite, "MOST_SECONDS", 2)
    started = tmp_path / "started"
    with pytest.raises(ChildFailed, match="was not done after 2 s"):
        run_group(["sh", "-c", f"sleep 99 & echo $! > {started}; wait"])
    wait_for(lambda: not Path(f"/proc/{started.read_text().strip()}").exists())


def test_the_reason_is_the_line_that_names_an_error() -> None:
    assert reason_of(f"Traceback\n  a line\n{OUT_OF_MEMORY}\n[rank0] Warning: process group\n") == OUT_OF_MEMORY
    assert reason_of("error: one line\n") == "error: one line"
    assert reason_of("Killed\n") == "Killed" and reason_of("") == ""


def test_a_suite_that_was_cut_short_goes_on_by_the_same_command(
    ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = [{"what": "train", "depth": 3}, {"what": "data"}]
    monkeypatch.setattr(benchmark_suite, "plan_suite", lambda config: planned)
    config = BenchmarkConfig(what="suite", out=str(tmp_path / "made" / "b.json"))

    def killed(settings: dict[str, Any]) -> list[dict[str, Any]]:
        if ran:
            raise KeyboardInterrupt
        return ran.append(settings) or [{"name": "a"}]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(benchmark_suite, "run_apart", killed)
        benchmark_suite.benchmark_suite(config, begin_report(config, []))
    rows = benchmark_suite.benchmark_suite(config, begin_report(config, []))
    assert ran == planned and [row["name"] for row in rows] == ["train d3: a", "data: a"]
    assert json.loads(Path(config.out).read_text())["rows"] == rows
