"""The contestants of the tokenizer's benchmark: encoding, decoding, and a step that moves the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from public_stand_in import stand_in
from tiny import PlainEngine

from launchers.bench import tokenizer as benchmark_tokenizer
from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import make_tokenizer
from launchers.bench.tokenizer import decoders, encoders, trainer
from training.engine.distributed import World
from training.flops import tokenizer_training_flops

CONFIG = BenchmarkConfig(what="tokenizer", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2, repeats=1)


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are trained, by plain engines: a DeepSpeed world is started by the tests of a run."""
    made: list[Any] = []

    def make(model: Any, *others: Any, **more: Any) -> PlainEngine:
        made.append(model)
        return PlainEngine(model)

    monkeypatch.setattr(benchmark_tokenizer, "Engine", make)
    monkeypatch.setattr(benchmark_tokenizer, "join_world", World)
    return made


def test_each_kind_of_work_has_rows_of_its_own_and_most_codes_do_not_change() -> None:
    rows = benchmark_tokenizer.benchmark_tokenizer(CONFIG)
    first = [row["name"] for row in rows if row["ratio"] == 1.0]
    assert first == ["ours, encode", "ours, decode, plain", "ours, training step without LPIPS"]
    assert rows[1]["equal_codes"] > 0.8 and all(row["mfu"] > 0 for row in rows)


def test_the_public_code_is_first_with_the_memory_of_each_kind_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, benchmark_tokenizer, lambda what, *, batch: {"encode": 9, "decode": 2}[what])
    rows = benchmark_tokenizer.benchmark_tokenizer(CONFIG)
    found = {row["name"]: row["working_bytes"] for row in rows}
    assert (found["public, encode"], found["public, decode"]) == (9, 2)
    assert min(size for name, size in found.items() if "ours" in name) > 1000
    assert [row["name"] for row in rows if row["ratio"] == 1.0][:2] == ["public, encode", "public, decode"]


def test_on_a_gpu_float32_is_set_against_the_peak_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.bench.machine_limits.device_type", lambda: "cuda")
    tokenizer = make_tokenizer(CONFIG)
    found = [*encoders(CONFIG, tokenizer), *decoders(replace(CONFIG, precision="bf16"), tokenizer)]
    assert [each.precision for each in found] == ["tf32"] * 4 + ["bf16"]


def test_fast_calls_leave_the_plain_tokenizer_alone() -> None:
    tokenizer = make_tokenizer(CONFIG)
    before = {name: weight.stride() for name, weight in tokenizer.state_dict().items()}
    assert [contestant.call() for contestant in encoders(CONFIG, tokenizer) + decoders(CONFIG, tokenizer)] == [2] * 4
    assert {name: weight.stride() for name, weight in tokenizer.state_dict().items()} == before
    assert all(level.upsample.folded is None for level in tokenizer.decoder.up[1:])


def test_a_training_step_moves_weights_of_a_copy(engines: list[Any]) -> None:
    tokenizer = make_tokenizer(CONFIG)
    step = trainer(CONFIG, tokenizer, World())
    assert step.call() == 2 and step.flops_per_image == tokenizer_training_flops(tokenizer.config)
    assert not torch.equal(engines[0].decoder.conv_out.weight, tokenizer.decoder.conv_out.weight)
