"""The contestants of the sampling benchmark draw what was asked for, by the settings of the released models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from public_stand_in import PublicStandIn, stand_in

from launchers.bench import sample as benchmark_sample
from launchers.bench.config import BenchmarkConfig
from launchers.bench.machine_limits import MIXED, common_precision
from launchers.bench.models import make_tokenizer, var_config
from launchers.bench.sample import SAMPLING, Drawing, as_the_launcher
from models.sampling import Sampling
from models.var import VAR

CONFIG = BenchmarkConfig(what="sample", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2, repeats=1)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> PublicStandIn:
    return stand_in(monkeypatch, benchmark_sample, lambda what, *, batch, **settings: 100 - batch)


def test_ours_stands_beside_the_public_code_at_every_batch_size(public: PublicStandIn) -> None:
    rows = benchmark_sample.benchmark_sample(replace(CONFIG, batches=(3,)))
    names = [row["name"] for row in rows]
    assert names[:2] == ["public, batch 2", "ours, batch 2"] and names[-2:] == ["public, batch 3", "ours, batch 3"]
    assert all("ours, " in name for name in names[2:-2]) and len(names) == len(set(names))
    assert public.asked[0] == ("sample", {"batch": 2, "cfg": 1.5, "top_k": 900, "top_p": 0.96})
    assert public.asked[-1][1]["batch"] == 3
    assert [row["working_bytes"] for row in rows if "public" in row["name"]] == [98, 97]  # of each batch its own


def test_without_the_public_code_ours_is_the_first() -> None:
    rows = benchmark_sample.benchmark_sample(CONFIG)
    assert rows[0]["name"] == "ours, batch 2" and rows[0]["ratio"] == 1.0 and rows[0]["mfu"] > 0


def test_settings_are_those_of_the_released_models() -> None:
    assert Sampling(cfg=1.5, top_k=900, top_p=0.96) == SAMPLING


def test_a_drawing_handles_its_batch_with_pixels_and_without() -> None:
    drawing = Drawing(VAR(var_config(CONFIG)), make_tokenizer(CONFIG), 2)
    assert drawing.codes() == drawing.images() == as_the_launcher(drawing)() == 2


def test_a_mean_of_two_precisions_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.bench.timing.matmul_flops_per_second", lambda precision: 1.0)  # slow in bf16
    rows = benchmark_sample.benchmark_sample(replace(CONFIG, precision="bf16"))
    assert {row["name"] for row in rows if "mfu" not in row} == {"ours, plain decoder in fp32, batch 2"}
    monkeypatch.setattr("launchers.bench.machine_limits.device_type", lambda: "cuda")  # where convolutions are in TF32
    precisions = (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"))
    assert [common_precision(*each) for each in precisions] == [MIXED, MIXED, "bf16"]


def test_compiled_steps_have_those_that_are_not_compiled_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[VAR] = []
    monkeypatch.setattr(VAR, "compile_generation", lambda self: compiled.append(self))  # takes a quarter of a minute
    rows = benchmark_sample.benchmark_sample(replace(CONFIG, compile=True))
    assert rows[0]["name"] == "ours, batch 2" and rows[-1]["name"] == "ours, not compiled, batch 2"
    assert len(compiled) == 1
    assert all(isinstance(parameter, torch.Tensor) for parameter in compiled[0].parameters())
