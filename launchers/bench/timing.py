"""The one timing harness: contestants timed in turns, and the matrix products that this machine reaches at its best.

Contestants take turns within one process tree, each turn in another order, so that a busy machine slows all of them. A
ratio is the median of the ratios of the turns, not the ratio of two medians. FLOPs are set against a peak that is
measured here and now: a share of it says what the code leaves unused, not how the machine was sold or cooled.

On a GPU `working_bytes` is the most memory that a call took above what was there when it began, and `peak_bytes` the
most that its process had, the weights and states of all contestants in it included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from launchers.bench.public_code import PublicCall
from training.engine.engine import PRECISIONS

import torch

Row = dict[str, Any]
NO_RIVALS: Mapping[str, str] = {}
WARM_UPS = 2  # turns: ZeRO-3 follows the trace of its second step from the third on
MATMUL_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}  # the best of these squares counts
MATMUL_SECONDS = 0.5  # for each of them
MIXED = ""  # the precision of work that has several: it has no one peak
TF32 = "tf32"  # float32 numbers whose products a GPU computes with 10 bits of their fractions


def device_type() -> str:
    """Return cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Contestant:
    """Something to time. `call` works to the end, also on a GPU, and returns how many images it has handled.

    A PublicCall works in a process of its own.
    """

    name: str
    call: Callable[[], int]
    flops_per_image: float = 0  # exact FLOPs; 0: not known
    precision: str = "fp32"  # whose peak the FLOPs are set against; MIXED: none
    extra: Callable[[], Row] = dict  # returns more columns, once all turns are done


def time_in_turns(
    contestants: Sequence[Contestant], repeats: int, *, rivals: Mapping[str, str] = NO_RIVALS
) -> list[Row]:
    """Time `repeats` turns after WARM_UPS; return for each contestant a row of samples a second and ratios.

    `ratio` is the speed over the first contestant's in the same turn. rivals: by column, the names of further
    contestants to whose speed each is compared, if they are there.
    """
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    memories: dict[str, Row] = {contestant.name: {} for contestant in contestants}
    shares_gpu = torch.cuda.is_available() and any(
        isinstance(contestant.call, PublicCall) for contestant in contestants
    )
    for turn in range(-WARM_UPS, repeats):
        for place in range(len(contestants)):
            contestant = contestants[(turn + place) % len(contestants)]
            rate, taken = _take_turn(contestant, shares_gpu=shares_gpu)
            if turn >= 0:
                rates[contestant.name].append(rate)
                most = memories[contestant.name]
                most |= {name: max(most.get(name, 0), value) for name, value in taken.items()}
    against = {"ratio": contestants[0].name} | {column: name for column, name in rivals.items() if name in rates}
    return [
        _speed_row(contestant, rates[contestant.name])
        | {column: _ratio(rates[contestant.name], rates[rival]) for column, rival in against.items()}
        | memories[contestant.name]
        | contestant.extra()
        for contestant in contestants
    ]


def _take_turn(contestant: Contestant, *, shares_gpu: bool) -> tuple[float, Row]:
    """Return the samples a second of one call, and the columns of the memory that it took on a GPU.

    Where several processes share a GPU, each gives back what it does not keep at the end of its turn, and begins with a
    call that is not timed.
    """
    call = contestant.call
    if shares_gpu:
        call()
    resident = 0
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
    start = time.perf_counter()
    count = call()
    rate = count / (time.perf_counter() - start)
    taken: Row = {}
    if isinstance(call, PublicCall):
        taken = call.memory
    elif torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        taken = {"peak_bytes": peak, "working_bytes": peak - resident}
    if shares_gpu:
        release = call.release if isinstance(call, PublicCall) else torch.cuda.empty_cache
        release()
    return rate, taken


def _ratio(rates: list[float], reference: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(rates, reference, strict=True))


def _speed_row(contestant: Contestant, rates: list[float]) -> Row:
    median = statistics.median(rates)
    row: Row = {
        "name": contestant.name,
        "samples_per_second": median,
        "slowest": min(rates),
        "fastest": max(rates),
    }
    if contestant.flops_per_image:
        row["tflops"] = median * contestant.flops_per_image / 1e12
        if contestant.precision != MIXED:
            peak = matmul_flops_per_second(contestant.precision)
            row |= {"mfu": median * contestant.flops_per_image / peak, "matmul_tflops": peak / 1e12}
    return row


def convolution_precision(precision: str) -> str:
    """Return the precision in which convolutions of such numbers are computed: TF32 for fp32 on a GPU that may."""
    return TF32 if (precision, device_type()) == ("fp32", "cuda") and torch.backends.cudnn.allow_tf32 else precision


def common_precision(products: str, convolutions: str) -> str:
    """Return the precision in which both are computed, or MIXED."""
    return products if convolution_precision(convolutions) == products else MIXED


@cache
def matmul_flops_per_second(precision: str) -> float:
    """Measure the FLOPs a second of large square matrix products in fp32, bf16, fp16 or tf32.

    A CPU has no TF32: there it is fp32.
    """
    if precision != TF32:
        return _best_matmul_rate(PRECISIONS[precision])
    if device_type() == "cpu":
        return matmul_flops_per_second("fp32")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return _best_matmul_rate(torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _best_matmul_rate(dtype: torch.dtype) -> float:
    """Return the best rate over all sides; a side whose product would take too long, as in bf16 on CPUs, ends it."""
    best = 0.0
    for side in MATMUL_SIDES[device_type()]:
        a, b = (torch.randn(side, side, device=device_type()).to(dtype) for _ in range(2))
        best = max(best, 2 * side**3 / _best_seconds(partial(torch.mm, a, b)))
        if 2 * (2 * side) ** 3 / best > 4 * MATMUL_SECONDS:
            break
    return best


def _best_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of many calls, after one to warm up: a peak is what nobody disturbed."""
    call()
    best, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end:
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
