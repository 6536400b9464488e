"""Contestants timed in turns within one process, so that a busy machine slows all of them; what they did with it.

A ratio is the median of those of the turns, not the ratio of two medians: the turns see the same weather. FLOPs and
bytes that a contestant names are set against what this machine was measured to reach (launchers/machine_limits.py).

Of a GPU's memory a row tells two things. `working_bytes` is the most that was allocated during a call above what was
there when it began: activations, gradients, temporaries. It is the call's own, whoever else lives in the process.
`peak_bytes` is the most that the process had at all, weights and states of all the contestants in it included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from launchers.machine_limits import copy_bytes_per_second, device_type, matmul_flops_per_second

Row = dict[str, Any]
GIB = 2**30
MIXED = ""  # the precision of work that has several: no one peak is its limit


@dataclass(frozen=True)
class Contestant:
    """Something to time. `call` works to the end, a GPU's too, and returns how many images it has handled."""

    name: str
    call: Callable[[], int]
    flops_per_image: float = 0  # exact FLOPs; 0: not known
    bytes_per_image: float = 0  # the least to be moved from and to memory; 0: not known
    bytes_on: str = field(default_factory=device_type)  # cpu or cuda: whose memory that is
    precision: str = "fp32"  # whose matmul peak the FLOPs are set against; MIXED: none, and no MFU
    memory: Callable[[], Row] | None = None  # what the latest call took in another process; None: it works in this one
    extra: Callable[[], Row] = dict  # more columns, asked for once all turns are done


def time_in_turns(contestants: Sequence[Contestant], repeats: int) -> list[Row]:
    """Samples a second of each, and its speed over the first one's in the same turn; one turn more to warm up."""
    rates: list[list[float]] = [[] for _ in contestants]
    memories: list[Row] = [{} for _ in contestants]
    for turn in range(repeats + 1):
        for number, contestant in enumerate(contestants):
            resident = _forget_peak()
            start = time.perf_counter()
            count = contestant.call()
            seconds = time.perf_counter() - start
            if turn:
                rates[number].append(count / seconds)
                taken = contestant.memory() if contestant.memory else _memory_above(resident)
                memories[number] = {name: max(memories[number].get(name, 0), value) for name, value in taken.items()}
    return [
        _row(contestant, found, rates[0]) | memory | contestant.extra()
        for contestant, found, memory in zip(contestants, rates, memories, strict=True)
    ]


def _row(contestant: Contestant, rates: list[float], reference: list[float]) -> Row:
    median = statistics.median(rates)
    row: Row = {
        "name": contestant.name,
        "samples_per_second": median,
        "slowest": min(rates),
        "fastest": max(rates),
        "ratio": statistics.median(one / other for one, other in zip(rates, reference, strict=True)),
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


COLUMNS: dict[str, Callable[[Any], str]] = {  # those that not every row has
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
        + "".join(f" {HEADINGS[name]:>10s}" for name in shown)
    ]
    for row in rows:
        speeds = "".join(f" {row[name]:12,.3f}" if name in row else 13 * " " for name in SPEEDS)
        ratio = f" {row['ratio']:7.3f}" if "ratio" in row else 8 * " "
        cells = "".join(f" {COLUMNS[name](row[name]) if name in row else '':>10s}" for name in shown)
        lines.append(f"{row['name']:{width}s}{speeds}{ratio}{cells}")
    return "\n".join(lines)


SPEEDS = ("samples_per_second", "slowest", "fastest")
