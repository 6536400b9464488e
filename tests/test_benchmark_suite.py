"""The suite runs every benchmark in a process of its own, and outlives those that fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from launchers import benchmark_suite
from launchers.benchmark_config import BENCHMARKS, BenchmarkConfig
from launchers.benchmark_suite import cpu_suite, gpu_suite, planned_batch, run_alone
from models.var import VARConfig
from training.engine import EngineConfig
from training.memory import estimate_memory

CONFIG = BenchmarkConfig(what="suite", repeats=2, against="somewhere")


def test_every_benchmark_is_in_it_with_settings_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    for planned in (cpu_suite(CONFIG), gpu_suite(CONFIG)):
        assert {settings["what"] for settings in planned} == set(BENCHMARKS) - {"suite"}
        assert all(BenchmarkConfig(**settings).against == "somewhere" for settings in planned)
    depths = {settings["depth"] for settings in gpu_suite(CONFIG) if settings["what"] == "train"}
    assert depths == {16, 20, 24, 30}


def test_the_batch_planned_fits_twice_and_the_next_does_not() -> None:
    total = 80 * 2**30
    batch = planned_batch(16, total)
    engines = [EngineConfig(precision="bf16", micro_batch=number) for number in (batch, 2 * batch)]
    fits, does_not = (estimate_memory(VARConfig(depth=16), engine, 1).peak.total for engine in engines)
    assert fits <= 0.45 * total < does_not and batch & (batch - 1) == 0


def test_a_benchmark_that_fails_is_a_row_that_says_why() -> None:
    rows = run_alone({"what": "train", "batch": 1, "against": "/nowhere/at/all", "depth": 1, "tokenizer_width": 32})
    assert len(rows) == 1 and "/nowhere/at/all" in rows[0]["name"]


def test_rows_carry_the_name_of_their_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_suite, "cpu_suite", lambda config: [{"what": "train", "depth": 3}, {"what": "data"}])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark_suite, "run_alone", lambda settings: [{"name": "a"}])
    assert [row["name"] for row in benchmark_suite.benchmark_suite(CONFIG)] == ["train 3: a", "data: a"]
