"""What this machine reaches at its best: floating point operations a second in matrix products, bytes copied a second.

Measured here and now rather than taken from a data sheet: a share of the peak then says what the code leaves unused,
not how the machine was sold, shared or cooled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from training.engine.engine import PRECISIONS

MATMUL_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}  # the best of these squares counts
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # more than any cache holds
SECONDS = 0.5  # for each thing measured
MIXED = ""  # the precision of work that has several: no one peak is its limit
TF32 = "tf32"  # float32 numbers whose products a GPU takes with 10 bits of their fractions: what cuDNN does


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def convolution_precision(precision: str) -> str:
    """In what convolutions are computed whose numbers are in `precision`: on a GPU fp32 ones in TF32, if torch may."""
    return TF32 if (precision, device_type()) == ("fp32", "cuda") and torch.backends.cudnn.allow_tf32 else precision


def common_precision(products: str, convolutions: str) -> str:
    """The precision in which both are computed, or MIXED."""
    return products if convolution_precision(convolutions) == products else MIXED


@cache
def matmul_flops_per_second(precision: str) -> float:
    """FLOPs a second of large square matrix products in fp32, bf16 or fp16, by the settings of torch as they are.

    tf32: of float32 numbers where TF32 is allowed; a CPU has none, so there it is fp32.
    """
    if precision != TF32:
        return _best_matmul_rate(PRECISIONS[precision])
    if device_type() == "cpu":
        return matmul_flops_per_second("fp32")
    with tf32_allowed():
        return _best_matmul_rate(torch.float32)


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Matrix products of a GPU may use TF32 meanwhile; afterwards they may what they might before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@cache
def copy_bytes_per_second(device: str) -> float:
    """Bytes read and written a second by the copy of a large tensor in the memory of the cpu or of cuda."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source))


def _best_matmul_rate(dtype: torch.dtype) -> float:
    """Of all sides, but for those after one so slow that the next would take long, as CPUs may be in 16 bit."""
    rates: list[float] = []
    for side in MATMUL_SIDES[device_type()]:
        rates.append(_matmul_rate(side, dtype))
        if 2 * side**3 / rates[-1] > SECONDS:
            break
    return max(rates)


def _matmul_rate(side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=device_type()).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=out))


def _best_seconds(call: Callable[[], Tensor]) -> float:
    """The shortest of many calls, after one to warm up: a peak is what nobody disturbed."""
    call()
    synchronize()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
