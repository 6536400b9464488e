"""The contestants of the training benchmark do training steps: their weights move, and one reads shards to do so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from public_stand_in import stand_in
from tiny import PlainEngine

from launchers.bench import train as benchmark_train
from launchers.bench.config import OURS, BenchmarkConfig
from launchers.bench.models import code_batch, make_tokenizer, make_var, var_config
from launchers.bench.train import OurStep, bare_step, engine_config, read_batches
from models.attention import MASKED
from models.var import FULL_CHECKPOINTING, VAR
from training.engine.distributed import World
from training.flops import encoding_flops, training_flops
from training.step_metrics import TimedIterator

CONFIG = BenchmarkConfig(what="train", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2, repeats=1)


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines that are made, as plain ones: a DeepSpeed world is started by the tests of a run."""
    made: list[Any] = []

    def make(model: Any, optimizer: Any, config: Any, **others: Any) -> PlainEngine:
        made.append((config, model))
        return PlainEngine(model)

    monkeypatch.setattr(benchmark_train, "Engine", make)
    monkeypatch.setattr(benchmark_train, "join_world", World)
    return made


def test_ours_reads_shards_and_stands_beside_a_bare_loop() -> None:
    ours, bare = benchmark_train.benchmark_train(CONFIG)
    assert ours["data_wait_ms"] > 0 and ours["ratio"] == 1.0
    assert 0 < ours["data_wait_share"] < 1
    flops = training_flops(var_config(CONFIG))
    assert bare["tflops"] == pytest.approx(bare["samples_per_second"] * flops / 1e12)
    assert bare["ratio_to_bare"] == 1.0 and ours["ratio_to_bare"] == pytest.approx(1 / bare["ratio"])


def test_ours_can_be_alone_on_its_device() -> None:
    rows = benchmark_train.benchmark_train(replace(CONFIG, contestants=OURS))
    assert [row["name"] for row in rows] == ["ours, codes from shards"]


def test_the_public_steps_have_each_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, benchmark_train, lambda what, *, batch, encodes: 9 if encodes else 2)
    rows = benchmark_train.benchmark_train(CONFIG)
    found = {row["name"]: row["working_bytes"] for row in rows}
    assert (found["public, codes in memory"], found["public, images encoded anew"]) == (2, 9)
    assert found["ours, codes from shards"] > 1000 and "public" in rows[0]["name"]
    assert rows[-1]["ratio_to_encoding"] == 1.0 and rows[1]["ratio_to_encoding"] > 0
    rates = {row["name"]: row["tflops"] / row["samples_per_second"] * 1e12 for row in rows}
    encoding = encoding_flops(make_tokenizer(CONFIG).config)
    assert rates["public, images encoded anew"] - rates["public, codes in memory"] == pytest.approx(encoding)


def test_the_bare_loop_runs_the_model_as_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(VAR, "compile_blocks", lambda self: compiled.append((self.attention, self.checkpointing)))
    config = replace(CONFIG, compile=True, attention=MASKED, activation_checkpointing=FULL_CHECKPOINTING)
    bare_step(config, make_var(config), make_tokenizer(config), code_batch(var_config(config), 2))
    assert compiled == [(MASKED, FULL_CHECKPOINTING)]


def test_data_wait_is_a_share_of_the_steps_after_the_first(tmp_path: Path) -> None:
    batches = TimedIterator(read_batches(CONFIG, tmp_path, World()))
    step = OurStep(CONFIG, engine_config(CONFIG), make_var(CONFIG), make_tokenizer(CONFIG), batches, World())
    step()
    (waited, taken), step.waits = step.waits[0], [(9.0, 9.0), (1.0, 3.0), (1.0, 5.0)]
    assert 0 < waited < taken
    assert step.data_wait() == {"data_wait_ms": 1000.0, "data_wait_share": 0.25}


def test_every_switch_is_timed_beside_none(without_deepspeed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.var.VAR.compile_blocks", lambda self: None)  # takes half a minute
    rows = benchmark_train.benchmark_switches(CONFIG)
    settings = [config for config, model in without_deepspeed]
    assert len(rows) == len(settings) == len({str(config) for config in settings})
    assert rows[0]["name"] == "as it comes" and rows[0]["ratio"] == 1.0


def test_each_call_is_a_step_of_training(without_deepspeed: list[Any], tmp_path: Path) -> None:
    tokenizer = make_tokenizer(CONFIG)
    batches = TimedIterator(read_batches(CONFIG, tmp_path, World()))
    step = OurStep(CONFIG, engine_config(CONFIG), make_var(CONFIG), tokenizer, batches, World())
    model = without_deepspeed[0][1]
    before = model.head.weight.detach().clone()
    assert step() == 2 and step() == 2 and step.samples_seen == 4
    assert not model.head.weight.equal(before)
    assert bare_step(CONFIG, make_var(CONFIG), tokenizer, code_batch(var_config(CONFIG), 2))() == 2
