"""Contestants are timed in turns, and what they did is set against what the machine can do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launchers.bench import timing as benchmark_timing
from launchers.bench.machine_limits import MIXED
from launchers.bench.timing import WARM_UPS, Contestant, table, time_in_turns


def test_calls_are_timed_in_turns_of_another_order_after_two_to_warm_up() -> None:
    order: list[str] = []
    contestants = [Contestant(name, lambda name=name: order.append(name) or 1) for name in "ab"]
    rows = time_in_turns(contestants, repeats=3)
    assert "".join(order) == "abbaabbaab" and [row["name"] for row in rows] == ["a", "b"]
    for row in rows:
        assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]
    assert rows[0]["ratio"] == 1.0


def test_each_is_compared_to_a_rival_turn_by_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """b is 1, 2 and 4 times as fast as a in the three turns, so 2; by the medians of both it would be 4."""
    clock = [0.0]

    def contestant(name: str, seconds: list[float]) -> Contestant:
        left = iter([1.0] * WARM_UPS + seconds)

        def call() -> int:
            clock[0] += next(left)
            return 1

        return Contestant(name, call)

    monkeypatch.setattr(benchmark_timing.time, "perf_counter", lambda: clock[0])
    a, b = contestant("a", [1.0, 8.0, 4.0]), contestant("b", [1.0, 4.0, 1.0])
    slow, fast = time_in_turns([a, b], repeats=3, rivals={"ratio_to_bare": "b"})
    assert (slow["ratio"], fast["ratio"]) == pytest.approx((1.0, 2.0))
    assert (slow["ratio_to_bare"], fast["ratio_to_bare"]) == pytest.approx((0.5, 1.0))
    assert fast["samples_per_second"] / slow["samples_per_second"] == pytest.approx(4.0)


def test_a_rival_that_is_not_there_is_compared_to_nobody() -> None:
    row = time_in_turns([Contestant("a", lambda: 1)], repeats=1, rivals={"ratio_to_bare": "c"})[0]
    assert "ratio_to_bare" not in row


def test_flops_and_bytes_are_shares_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_timing, "matmul_flops_per_second", lambda precision: {"bf16": 400.0}[precision])
    monkeypatch.setattr(benchmark_timing, "copy_bytes_per_second", lambda device: {"cpu": 50.0}[device])
    contestant = Contestant(
        "a", lambda: 1, 2.0, 5.0, bytes_on="cpu", precision="bf16", extra=lambda: {"data_wait_ms": 0.5}
    )
    row = time_in_turns([contestant], repeats=1)[0]
    rate = row["samples_per_second"]
    assert row["mfu"] == pytest.approx(rate * 2 / 400) and row["bandwidth_share"] == pytest.approx(rate * 5 / 50)
    assert row["data_wait_ms"] == 0.5
    assert row["matmul_tflops"] == pytest.approx(400e-12) and row["copy_gb_per_second"] == pytest.approx(50e-9)


def test_work_of_several_precisions_has_no_mfu() -> None:
    row = time_in_turns([Contestant("a", lambda: 1, 2.0, precision=MIXED)], repeats=1)[0]
    assert "mfu" not in row and row["tflops"] == pytest.approx(row["samples_per_second"] * 2 / 1e12)


def test_memory_is_that_of_the_worst_call_after_warming_up() -> None:
    taken: list[int] = []
    sizes = {1: 900, 2: 800, 3: 5, 4: 7, 5: 6}
    elsewhere = SimpleNamespace(memory=lambda: {"working_bytes": sizes[len(taken)]})
    contestant = Contestant("a", lambda: taken.append(1) or 1, elsewhere=elsewhere)
    assert time_in_turns([contestant], repeats=3)[0]["working_bytes"] == 7


def test_processes_that_share_a_gpu_give_back_what_they_do_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is timed is a call that finds its memory again."""
    done: list[str] = []
    for name, value in (("reset_peak_memory_stats", None), ("memory_allocated", 0), ("max_memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("ours released"))
    elsewhere = SimpleNamespace(memory=dict, release=lambda: done.append("theirs released"))
    theirs = Contestant("a", lambda: done.append("theirs") or 1, elsewhere=elsewhere)
    time_in_turns([theirs, Contestant("b", lambda: done.append("ours") or 1)], repeats=1)
    assert done[-6:] == ["theirs", "theirs", "theirs released", "ours", "ours", "ours released"]


@pytest.mark.parametrize(
    "change, is_counted", [({}, True), ({"has_threads": True}, False), ({"flops_per_image": 0}, False)]
)
def test_on_a_cpu_one_more_call_of_a_model_counts_what_it_takes(change: dict[str, Any], is_counted: bool) -> None:
    calls: list[torch.Tensor] = []

    def call() -> int:
        calls.append(torch.ones(1000).exp())  # 4,000 bytes and, for a moment, as many again
        return 1

    contestant = replace(Contestant("a", call, flops_per_image=1.0), **change)
    row = time_in_turns([contestant], repeats=1)[0]
    assert row.get("working_bytes") == (8000 if is_counted else None) and len(calls) == 3 + is_counted


def test_what_a_call_takes_of_a_gpu_is_apart_from_what_lay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 40)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    row = time_in_turns([Contestant("a", lambda: 1)], repeats=1)[0]
    assert (row["peak_bytes"], row["working_bytes"]) == (100, 60)


def test_the_table_has_the_columns_that_any_row_has() -> None:
    rows = time_in_turns([Contestant("plain", lambda: 1)], repeats=1)
    assert "MFU" not in table(rows)
    shown = table([*rows, {"name": "memory alone", "peak_bytes": 3 * 2**30}]).splitlines()
    assert shown[0].split()[-1] == "peak" and shown[-1].endswith("3.00 GiB") and len(shown) == 3
