"""What a machine reaches is measured by doing it."""

from __future__ import annotations

import pytest
import torch

from launchers.bench import machine_limits


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
        assert machine_limits.matmul_flops_per_second("tf32") > 1e6
        assert machine_limits.copy_bytes_per_second("cpu") > 1e6
    finally:
        for measured in (machine_limits.matmul_flops_per_second, machine_limits.copy_bytes_per_second):
            measured.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does")
def test_a_cpu_has_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_limits, "_matmul_rate", lambda side, dtype: float(side))
    machine_limits.matmul_flops_per_second.cache_clear()
    try:
        assert machine_limits.matmul_flops_per_second("tf32") == machine_limits.matmul_flops_per_second("fp32")
    finally:
        machine_limits.matmul_flops_per_second.cache_clear()
    assert machine_limits.convolution_precision("fp32") == "fp32"


def test_the_peak_of_tf32_is_measured_with_it_and_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[bool] = []

    def measured(side: int, dtype: torch.dtype) -> float:
        settings.append(torch.backends.cuda.matmul.allow_tf32)
        return 1.0

    monkeypatch.setattr(machine_limits, "device_type", lambda: "cuda")
    monkeypatch.setattr(machine_limits, "_matmul_rate", measured)
    before = torch.backends.cuda.matmul.allow_tf32
    machine_limits.matmul_flops_per_second.cache_clear()
    try:
        machine_limits.matmul_flops_per_second("tf32")
    finally:
        machine_limits.matmul_flops_per_second.cache_clear()
    assert set(settings) == {True} and torch.backends.cuda.matmul.allow_tf32 == before
    with pytest.raises(ZeroDivisionError), machine_limits.tf32_allowed():
        1 / 0
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_float32_convolutions_on_a_gpu_are_in_tf32_unless_torch_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_limits, "device_type", lambda: "cuda")
    assert [machine_limits.convolution_precision(name) for name in ("fp32", "bf16")] == ["tf32", "bf16"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert machine_limits.convolution_precision("fp32") == "fp32"


def test_no_larger_product_is_tried_after_one_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def rate(side: int, dtype: torch.dtype) -> float:
        tried.append(side)
        return 1e15 if dtype == torch.float32 else 1e6

    monkeypatch.setattr(machine_limits, "_matmul_rate", rate)
    sides = list(machine_limits.MATMUL_SIDES[machine_limits.device_type()])
    machine_limits._best_matmul_rate(torch.float32)
    assert tried == sides
    machine_limits._best_matmul_rate(torch.bfloat16)
    assert tried == [*sides, sides[0]]
