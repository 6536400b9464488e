"""The contestants of the sampling benchmark draw what was asked for, by the settings of the released models."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from launchers import benchmark_sample
from launchers.benchmark_config import BenchmarkConfig
from launchers.benchmark_models import make_tokenizer, var_config
from launchers.benchmark_sample import SAMPLING, Drawing, as_the_launcher
from models.sampling import Sampling
from models.var import VAR

CONFIG = BenchmarkConfig(what="sample", depth=1, patch_nums=(1, 2), tokenizer_width=32, batch=2, repeats=1)


class Public:
    """In the place of the public code's process: remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def timed(self, what: str, **settings: Any) -> Any:
        return lambda: self.asked.append((what, settings)) or settings["batch"]

    def peak(self) -> dict[str, int]:
        return {}


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Public:
    found = Public()

    @contextmanager
    def give(*models: Any):
        yield found

    monkeypatch.setattr(benchmark_sample, "public_code", give)
    return found


def test_ours_stands_beside_the_public_code_at_every_batch_size(public: Public) -> None:
    rows = benchmark_sample.benchmark_sample(replace(CONFIG, batches=(3,)))
    names = [row["name"] for row in rows]
    assert names[:2] == ["public, batch 2", "ours, batch 2"] and names[-2:] == ["public, batch 3", "ours, batch 3"]
    assert all("ours, " in name for name in names[2:-2]) and len(names) == len(set(names))
    assert public.asked[0] == ("sample", {"batch": 2, "cfg": 1.5, "top_k": 900, "top_p": 0.96})
    assert public.asked[-1][1]["batch"] == 3


def test_without_the_public_code_ours_is_the_first() -> None:
    rows = benchmark_sample.benchmark_sample(CONFIG)
    assert rows[0]["name"] == "ours, batch 2" and rows[0]["ratio"] == 1.0 and rows[0]["mfu"] > 0


def test_settings_are_those_of_the_released_models() -> None:
    assert SAMPLING == Sampling(cfg=1.5, top_k=900, top_p=0.96)


def test_a_drawing_handles_its_batch_with_pixels_and_without() -> None:
    drawing = Drawing(VAR(var_config(CONFIG)), make_tokenizer(CONFIG), 2)
    assert drawing.codes() == drawing.images() == as_the_launcher(drawing)() == 2


def test_compiled_steps_are_one_more_row(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[VAR] = []
    monkeypatch.setattr(VAR, "compile_generation", lambda self: compiled.append(self))  # takes a quarter of a minute
    rows = benchmark_sample.benchmark_sample(replace(CONFIG, compile=True))
    assert rows[-1]["name"] == "ours, compiled, batch 2" and len(compiled) == 1
    assert all(isinstance(parameter, torch.Tensor) for parameter in compiled[0].parameters())
