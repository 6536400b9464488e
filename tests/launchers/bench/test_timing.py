"""Contestants are timed in turns, and what they did is set against what the machine can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launchers.bench import timing
from launchers.bench.public_code import PublicCall
from launchers.bench.timing import (
    MIXED,
    WARM_UPS,
    Contestant,
    common_precision,
    convolution_precision,
    matmul_flops_per_second,
    time_in_turns,
)


def test_calls_are_timed_in_turns_of_another_order_after_two_to_warm_up() -> None:
    order: list[str] = []
    contestants = [Contestant(name, lambda name=name: order.append(name) or 1) for name in "ab"]
    rows = time_in_turns(contestants, repeats=3)
    assert "".join(order) == "abbaabbaab" and [row["name"] for row in rows] == ["a", "b"]
    for row in rows:
        assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]
    assert rows[0]["ratio"] == 1.0


def test_a_ratio_is_the_median_of_those_of_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """b is 1, 2 and 4 times as fast as a in the three turns, so 2; by the medians of both it would be 4."""
    clock = [0.0]

    def contestant(name: str, seconds: list[float]) -> Contestant:
        left = iter([1.0] * WARM_UPS + seconds)

        def call() -> int:
            clock[0] += next(left)
            return 1

        return Contestant(name, call)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    a, b = contestant("a", [1.0, 8.0, 4.0]), contestant("b", [1.0, 4.0, 1.0])
    rivals = {"ratio_to_bare": "b", "ratio_to_encoding": "nobody"}
    slow, fast = time_in_turns([a, b], repeats=3, rivals=rivals)
    assert (slow["ratio"], fast["ratio"]) == pytest.approx((1.0, 2.0))
    assert (slow["ratio_to_bare"], fast["ratio_to_bare"]) == pytest.approx((0.5, 1.0))
    assert fast["samples_per_second"] / slow["samples_per_second"] == pytest.approx(4.0)
    assert (slow["slowest"], slow["fastest"]) == pytest.approx((1 / 8, 1.0)) and "ratio_to_encoding" not in slow


def test_flops_are_a_share_of_the_peak_of_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "matmul_flops_per_second", {"bf16": 400.0}.__getitem__)
    contestants = [
        Contestant("a", lambda: 1, 2.0, "bf16", extra=lambda: {"data_wait_ms": 0.5}),
        Contestant("b", lambda: 1, 2.0, MIXED),
    ]
    row, mixed = time_in_turns(contestants, repeats=1)
    assert row["mfu"] == pytest.approx(row["samples_per_second"] * 2 / 400)
    assert row["matmul_tflops"] == pytest.approx(400e-12) and row["data_wait_ms"] == 0.5
    assert "mfu" not in mixed and mixed["tflops"] == pytest.approx(mixed["samples_per_second"] * 2 / 1e12)


class Public:
    """A process of the public code that takes less memory in each turn."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def ask(self, request: dict[str, Any]) -> dict[str, int]:
        self.done.append(request["what"])
        return {"working_bytes": 1000 - len(self.done)}


def test_processes_that_share_a_gpu_give_back_what_they_do_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is not timed comes first in each turn, in which the memory is taken again."""
    done: list[str] = []
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 40), ("max_memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("ours released"))
    theirs = Contestant("a", PublicCall(Public(done), {"what": "theirs", "batch": 1}))  # type: ignore[arg-type]
    public, ours = time_in_turns([theirs, Contestant("b", lambda: done.append("ours") or 1)], repeats=2)
    assert done[-6:] == ["ours", "ours", "ours released", "theirs", "theirs", "release"]
    assert (ours["peak_bytes"], ours["working_bytes"]) == (100, 60) and "peak_bytes" not in public
    assert public["working_bytes"] == 1000 - 14  # that of the first timed call, after two turns of both to warm up


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(timing, "MATMUL_SECONDS", 0.02)
    monkeypatch.setattr(timing, "MATMUL_SIDES", {"cpu": (64, 128), "cuda": (64, 128)})
    matmul_flops_per_second.cache_clear()
    yield
    matmul_flops_per_second.cache_clear()


@pytest.mark.usefixtures("small_products")
def test_the_peak_is_that_of_products_that_were_made() -> None:
    assert matmul_flops_per_second("fp32") > 1e6  # a multiplication takes less than a microsecond


@pytest.mark.usefixtures("small_products")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU that stands for a GPU")
def test_tf32_is_allowed_only_while_its_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matmul_flops_per_second("tf32") == matmul_flops_per_second("fp32")  # a CPU has none
    assert convolution_precision("fp32") == "fp32"
    matmul_flops_per_second.cache_clear()
    settings: list[bool] = []
    monkeypatch.setattr(timing, "device_type", lambda: "cuda")
    monkeypatch.setattr(
        timing, "_best_matmul_rate", lambda dtype: settings.append(torch.backends.cuda.matmul.allow_tf32) or 1.0
    )
    before = torch.backends.cuda.matmul.allow_tf32
    assert matmul_flops_per_second("tf32") == 1.0
    assert settings == [True] and torch.backends.cuda.matmul.allow_tf32 == before


def test_a_gpu_computes_float32_convolutions_in_tf32_unless_torch_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "device_type", lambda: "cuda")
    assert [convolution_precision(name) for name in ("fp32", "bf16")] == ["tf32", "bf16"]
    precisions = (("fp32", "fp32"), ("fp16", "fp32"), ("bf16", "bf16"))
    assert [common_precision(*each) for each in precisions] == [MIXED, MIXED, "bf16"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert convolution_precision("fp32") == "fp32"
