"""Contestants timed in turns within one process, so that a busy machine slows all of them; what they did with it.

A ratio is the median of those of the turns, not the ratio of two medians: the turns see the same weather, and each has
another order. FLOPs and bytes that a contestant names are set against what this machine was measured to reach
(launchers/bench/machine_limits.py).

`working_bytes` is the most memory that was allocated during a call above what was there when it began: activations,
gradients, temporaries. It is the call's own, whoever else lives in the process. On a GPU `peak_bytes` beside it is the
most that the process had at all, weights and states of all the contestants in it included. On a CPU, where to count is
slow, models have one more call for it, which is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from launchers.bench.allocations import AllocationRecorder
from launchers.bench.machine_limits import MIXED, copy_bytes_per_second, device_type, matmul_flops_per_second

Row = dict[str, Any]
NO_RIVALS: Mapping[str, str] = {}
GIB = 2**30
WARM_UPS = 2  # turns: ZeRO-3 follows the trace of its second step from the third on


class Elsewhere(Protocol):
    """Another process, in which a contestant works."""

    def memory(self) -> Row: ...  # the columns of what the latest call took of a GPU

    def release(self) -> None: ...  # gives back the memory of a GPU that it holds for calls to come


@dataclass(frozen=True)
class Contestant:
    """Something to time. `call` works to the end, a GPU's too, and returns how many images it has handled."""

    name: str
    call: Callable[[], int]
    flops_per_image: float = 0  # exact FLOPs; 0: not known
    bytes_per_image: float = 0  # to be moved from and to memory; 0: not known
    bytes_on: str = field(default_factory=device_type)  # cpu or cuda: whose memory that is
    precision: str = "fp32"  # whose matmul peak the FLOPs are set against; MIXED: none, and no MFU
    elsewhere: Elsewhere | None = None  # the process that works; None: this one
    has_threads: bool = False  # of its own, whose memory on a CPU nobody counts
    extra: Callable[[], Row] = dict  # more columns, asked for once all turns are done


def time_in_turns(
    contestants: Sequence[Contestant], repeats: int, *, rivals: Mapping[str, str] = NO_RIVALS
) -> list[Row]:
    """Samples a second of each, and its speed over the first one's in the same turn; WARM_UPS turns more come first.

    rivals: by column, the names of further contestants to whose speed each is compared, if they are there. Where
    several processes share a GPU, each gives back what it does not keep at the end of its turn, and begins with a call
    that is not timed.
    """
    rates, memories = _take_turns(contestants, repeats)
    rows = [
        _row(contestant, found) | {"ratio": _ratio(found, rates[0])} | memory | contestant.extra()
        for contestant, found, memory in zip(contestants, rates, memories, strict=True)
    ]
    rates_of = {contestant.name: found for contestant, found in zip(contestants, rates, strict=True)}
    there = {column: rates_of[name] for column, name in rivals.items() if name in rates_of}
    for row, contestant, found in zip(rows, contestants, rates, strict=True):
        row |= {column: _ratio(found, others) for column, others in there.items()}
        row |= _memory_on_cpu(contestant)
    return rows


def _take_turns(contestants: Sequence[Contestant], repeats: int) -> tuple[list[list[float]], list[Row]]:
    """Of each contestant its samples a second in every turn, and the most memory that it took on a GPU."""
    shares_gpu = torch.cuda.is_available() and any(contestant.elsewhere for contestant in contestants)
    rates: list[list[float]] = [[] for _ in contestants]
    memories: list[Row] = [{} for _ in contestants]
    for turn in range(-WARM_UPS, repeats):
        for place in range(len(contestants)):
            number = (turn + place) % len(contestants)
            rate, taken = _take_turn(contestants[number], shares_gpu=shares_gpu)
            if turn >= 0:
                rates[number].append(rate)
                memories[number] = {name: max(memories[number].get(name, 0), value) for name, value in taken.items()}
    return rates, memories


def _take_turn(contestant: Contestant, *, shares_gpu: bool) -> tuple[float, Row]:
    """Samples a second of one call, and the columns of the memory that it took."""
    elsewhere = contestant.elsewhere
    if shares_gpu:
        contestant.call()
    resident = _forget_peak()
    start = time.perf_counter()
    count = contestant.call()
    rate = count / (time.perf_counter() - start)
    taken = elsewhere.memory() if elsewhere else _memory_above(resident)
    if shares_gpu:
        release = elsewhere.release if elsewhere else torch.cuda.empty_cache
        release()
    return rate, taken


def _ratio(rates: list[float], reference: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(rates, reference, strict=True))


def _row(contestant: Contestant, rates: list[float]) -> Row:
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
            peak_rate = matmul_flops_per_second(contestant.precision)
            row |= {"mfu": median * contestant.flops_per_image / peak_rate, "matmul_tflops": peak_rate / 1e12}
    if contestant.bytes_per_image:
        moved, bandwidth = median * contestant.bytes_per_image, copy_bytes_per_second(contestant.bytes_on)
        row |= {"gb_per_second": moved / 1e9, "bandwidth_share": moved / bandwidth}
        row["copy_gb_per_second"] = bandwidth / 1e9
    return row


def _forget_peak() -> int:
    """Bytes of tensors on the GPU now; from here on its peak is counted. 0 on the CPU, where nobody counts."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _memory_above(resident: int) -> Row:
    """The columns of the memory taken since `_forget_peak`, which found `resident` bytes."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated()
    return {"peak_bytes": peak, "working_bytes": peak - resident}


def _memory_on_cpu(contestant: Contestant) -> Row:
    """`working_bytes` of one more call, if it is a model that works on the CPU, and in this thread."""
    is_counted = not (torch.cuda.is_available() or contestant.elsewhere or contestant.has_threads)
    if not is_counted or not contestant.flops_per_image:
        return {}
    with AllocationRecorder() as recorder:
        contestant.call()
        recorder.mark("done")
    return {"working_bytes": recorder.phases[0].peak}


COLUMNS: dict[str, Callable[[Any], str]] = {  # those that not every row has
    "ratio_to_bare": lambda value: f"{value:.3f}",
    "ratio_to_encoding": lambda value: f"{value:.3f}",
    "tflops": lambda value: f"{value:.3g}",
    "mfu": lambda value: f"{value:.1%}",
    "gb_per_second": lambda value: f"{value:.3g}",
    "bandwidth_share": lambda value: f"{value:.1%}",
    "working_bytes": lambda value: f"{value / GIB:.2f} GiB",
    "peak_bytes": lambda value: f"{value / GIB:.2f} GiB",
    "predicted_bytes": lambda value: f"{value / GIB:.2f} GiB",
    "equal_codes": lambda value: f"{value:.2%}",
    "error": lambda value: f"{value:+.1%}",
    "data_wait_ms": lambda value: f"{value:.1f} ms",
    "data_wait_share": lambda value: f"{value:.2%}",
}
HEADINGS = {
    "ratio_to_bare": "to bare",
    "ratio_to_encoding": "to encoding",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "gb_per_second": "GB/s",
    "bandwidth_share": "bandwidth",
    "working_bytes": "working",
    "peak_bytes": "peak",
    "predicted_bytes": "predicted",
    "equal_codes": "same codes",
    "error": "error",
    "data_wait_ms": "data wait",
    "data_wait_share": "of a step",
}


def table(rows: list[Row]) -> str:
    """The rows for people, with the columns that any of them has."""
    if not rows:
        return "nothing was timed"
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    width = max(len(row["name"]) for row in rows)
    lines = [
        f"{'':{width}s} {'samples/s':>12s} {'slowest':>12s} {'fastest':>12s} {'ratio':>7s}"
        + "".join(f" {HEADINGS[name]:>11s}" for name in shown)
    ]
    for row in rows:
        speeds = "".join(f" {row[name]:12,.3f}" if name in row else 13 * " " for name in SPEEDS)
        ratio = f" {row['ratio']:7.3f}" if "ratio" in row else 8 * " "
        cells = "".join(f" {COLUMNS[name](row[name]) if name in row else '':>11s}" for name in shown)
        lines.append(f"{row['name']:{width}s}{speeds}{ratio}{cells}")
    return "\n".join(lines)


SPEEDS = ("samples_per_second", "slowest", "fastest")
