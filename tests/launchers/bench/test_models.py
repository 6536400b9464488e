"""What stands beside each other does the same work: the contestants of sampling, of training and of the tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_world import ForkServer
from public_stand_in import write_checkout
from tiny import PlainEngine

from launchers.bench import sample, tokenizer, train
from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import code_batch, image_batch, make_tokenizer, make_var, var_config
from launchers.bench.sample import Drawing, as_the_launcher, benchmark_sample
from launchers.bench.train import BARE, ENCODING, OURS_ON_CODES, PUBLIC, OurStep, bare_step
from models.attention import MASKED
from models.generation import check_configs_agree
from models.sampling import Sampling
from models.var import FULL_CHECKPOINTING, VAR
from training.engine.distributed import World
from training.flops import encoding_flops, training_flops
from training.step_metrics import TimedIterator

CONFIG = BenchmarkConfig(what="train", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2, repeats=1)
SMALL = ["depth=1", "patch_nums=[1,2]", "tokenizer_width=32", "batch=2", "repeats=1"]


def run(fork_server: ForkServer, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of a benchmark as a user runs it, beside a stand-in of the public code."""
    checkout = write_checkout(folder / "VAR", threads=1)
    given = [*arguments, *SMALL, f"against={checkout}", f"out={folder / 'b.json'}"]
    order = {"name": "benchmark", "arguments": given, "folder": str(folder), "alone": False}
    world = fork_server.run("launcher_worker:launch", order, world_size=1, timeout=400)
    assert world.exit_codes == [0], world.explain()
    return json.loads((folder / "b.json").read_text())["rows"]


def test_models_and_batches_fit_together() -> None:
    model_config, made = var_config(CONFIG), make_tokenizer(CONFIG)
    check_configs_agree(model_config, made.config)
    codes, images = code_batch(model_config, 2), image_batch(model_config, made.config, 2)
    assert made.encode(images.data).shape == codes.data.shape == (2, 5)
    assert codes.labels.tolist() == images.labels.tolist() == [0, 1]


def test_a_step_stands_beside_a_bare_loop_and_both_steps_of_the_public_code(
    tmp_path: Path, fork_server: ForkServer
) -> None:
    rows = run(fork_server, tmp_path, "train")
    assert [row["name"] for row in rows] == [PUBLIC, OURS_ON_CODES, BARE, ENCODING]
    public, ours, bare, encoding = rows
    assert public["ratio"] == bare["ratio_to_bare"] == encoding["ratio_to_encoding"] == 1.0
    assert ours["ratio_to_bare"] == pytest.approx(1 / bare["ratio"] * ours["ratio"])
    assert ours["data_wait_ms"] > 0 and 0 < ours["data_wait_share"] < 1
    flops = [row["tflops"] / row["samples_per_second"] * 1e12 for row in rows]
    step, encode = training_flops(var_config(CONFIG)), encoding_flops(make_tokenizer(CONFIG).config)
    assert flops == pytest.approx([step, step, step, step + encode])


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("what, rows", [("tokenizer", 7), ("sample", 7)])
def test_every_benchmark_of_models_runs(what: str, rows: int, tmp_path: Path, fork_server: ForkServer) -> None:
    found = run(fork_server, tmp_path, what, *["batches=[3]"] * (what == "sample"))
    assert len(found) == len({row["name"] for row in found}) == rows
    assert found[0]["ratio"] == 1.0 and all(row["samples_per_second"] > 0 for row in found)


@pytest.fixture
def without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda model, optimizer, config, **others: PlainEngine(model)  # noqa: E731
    monkeypatch.setattr(train, "Engine", make)
    monkeypatch.setattr(tokenizer, "Engine", make)


@pytest.mark.usefixtures("without_deepspeed")
def test_each_call_is_a_step_of_training(tmp_path: Path) -> None:
    frozen, model = make_tokenizer(CONFIG), make_var(CONFIG)
    batches = TimedIterator(train.read_batches(CONFIG, tmp_path, World()))
    step = OurStep(CONFIG, model, frozen, batches, World())
    before = model.head.weight.detach().clone()
    assert step() == 2 and step() == 2 and step.samples_seen == 4
    assert not model.head.weight.equal(before)
    step.waits = [(9.0, 9.0), (1.0, 3.0), (1.0, 5.0)]
    assert step.data_wait() == {"data_wait_ms": 1000.0, "data_wait_share": 0.25}  # the first step starts the reader
    other = make_var(CONFIG)
    assert bare_step(CONFIG, other, frozen, code_batch(var_config(CONFIG), 2))() == 2
    assert not other.head.weight.equal(before)


@pytest.mark.usefixtures("without_deepspeed")
def test_a_training_step_of_the_tokenizer_leaves_the_one_that_is_timed_as_it_was() -> None:
    made = make_tokenizer(CONFIG)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert tokenizer.trainer(CONFIG, made, World()).call() == 2
    assert all(value.equal(before[name]) for name, value in made.state_dict().items())


def test_the_bare_loop_runs_the_model_as_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(VAR, "compile_blocks", lambda self: compiled.append((self.attention, self.checkpointing)))
    config = replace(CONFIG, compile=True, attention=MASKED, activation_checkpointing=FULL_CHECKPOINTING)
    bare_step(config, make_var(config), make_tokenizer(config), code_batch(var_config(config), 2))
    assert compiled == [(MASKED, FULL_CHECKPOINTING)]


def test_a_drawing_handles_its_batch_with_the_settings_of_the_released_models() -> None:
    drawing = Drawing(make_var(CONFIG), make_tokenizer(CONFIG), 2)
    assert drawing.codes() == drawing.images() == as_the_launcher(drawing)() == 2
    assert Sampling(cfg=1.5, top_k=900, top_p=0.96) == sample.SAMPLING


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in's tensors lie on the CPU")
def test_ours_stands_beside_the_public_code_at_every_batch_size_and_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[VAR] = []
    monkeypatch.setattr(VAR, "compile_generation", lambda self: compiled.append(self))  # takes a quarter of a minute
    checkout = write_checkout(tmp_path, threads=torch.get_num_threads())
    config = replace(CONFIG, what="sample", compile=True, batches=(3,), against=str(checkout))
    names = [row["name"] for row in benchmark_sample(config)]
    assert names[:2] == ["public, batch 2", "ours, batch 2"] and names[-2:] == ["public, batch 3", "ours, batch 3"]
    assert names[-3] == "ours, not compiled, batch 2" and len(names) == len(set(names)) == 8 and len(compiled) == 1


def test_channels_last_says_how_many_codes_stay_the_same() -> None:
    *_, turned = tokenizer.encoders(CONFIG, make_tokenizer(CONFIG))
    assert turned.call() == 2 and turned.extra()["equal_codes"] > 0.5
