"""Contestants are timed in turns, and what they did is set against what the machine can do."""

from __future__ import annotations

import pytest
import torch

from launchers import benchmark_timing
from launchers.benchmark_timing import MIXED, Contestant, table, time_in_turns


def test_calls_are_timed_in_turns_after_one_to_warm_up() -> None:
    order: list[str] = []
    contestants = [Contestant(name, lambda name=name: order.append(name) or 1) for name in "ab"]
    rows = time_in_turns(contestants, repeats=3)
    assert "".join(order) == "abababab" and [row["name"] for row in rows] == ["a", "b"]
    for row in rows:
        assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]
    assert rows[0]["ratio"] == 1.0


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
    sizes = {1: 900, 2: 5, 3: 7, 4: 6}
    contestant = Contestant("a", lambda: taken.append(1) or 1, memory=lambda: {"working_bytes": sizes[len(taken)]})
    assert time_in_turns([contestant], repeats=3)[0]["working_bytes"] == 7


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
