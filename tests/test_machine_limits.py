"""What a machine reaches is measured by doing it."""

from __future__ import annotations

import pytest
import torch

from launchers import machine_limits


def test_the_best_rate_is_that_of_the_shortest_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_limits, "SECONDS", 0.02)
    monkeypatch.setattr(machine_limits, "MATMUL_SIDES", {"cpu": (64, 128), "cuda": (64, 128)})
    monkeypatch.setattr(machine_limits, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**16})
    rates = [machine_limits._matmul_rate(side, torch.float32) for side in (64, 128)]
    assert min(rates) > 1e6  # a multiplication takes less than a microsecond on whatever this is
    for measured in (machine_limits.matmul_flops_per_second, machine_limits.copy_bytes_per_second):
        measured.cache_clear()
    try:
        assert machine_limits.matmul_flops_per_second("fp32") > 1e6
        assert machine_limits.copy_bytes_per_second() > 1e6
    finally:
        for measured in (machine_limits.matmul_flops_per_second, machine_limits.copy_bytes_per_second):
            measured.cache_clear()
