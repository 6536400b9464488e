"""Contestants timed in turns within one process, so that a busy machine slows all of them; what they did with it.

A ratio is the median of those of the turns, not the ratio of two medians: the turns see the same weather. FLOPs and
bytes that a contestant names are set against what this machine was measured to reach (launchers/machine_limits.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from launchers.machine_limits import copy_bytes_per_second, matmul_flops_per_second

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Contestant:
    """Something to time. `call` works to the end, a GPU's too, and returns how many images it has handled."""

    name: str
    call: Callable[[], int]
    flops_per_image: float = 0  # exact FLOPs; 0: not known
    bytes_per_image: float = 0  # moved to or from memory; 0: not known
    precision: str = "fp32"  # whose matmul peak the FLOPs are set against
    extra: Callable[[], Row] = dict  # more columns, asked for once all turns are done


def time_in_turns(contestants: Sequence[Contestant], repeats: int) -> list[Row]:
    """Samples a second of each, and its speed over the first one's in the same turn; one turn more to warm up."""
    rates: list[list[float]] = [[] for _ in contestants]
    peaks = [0] * len(contestants)
    for turn in range(repeats + 1):
        for number, contestant in enumerate(contestants):
            _forget_peak()
            start = time.perf_counter()
            count = contestant.call()
            if turn:
                rates[number].append(count / (time.perf_counter() - start))
                peaks[number] = max(peaks[number], _peak())
    return [
        _row(contestant, found, rates[0], peak)
        for contestant, found, peak in zip(contestants, rates, peaks, strict=True)
    ]


def _row(contestant: Contestant, rates: list[float], reference: list[float], peak: int) -> Row:
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
        peak_rate = matmul_flops_per_second(contestant.precision)
        row |= {"mfu": median * contestant.flops_per_image / peak_rate, "matmul_tflops": peak_rate / 1e12}
    if contestant.bytes_per_image:
        bandwidth = copy_bytes_per_second()
        row |= {
            "bandwidth_share": median * contestant.bytes_per_image / bandwidth,
            "copy_gb_per_second": bandwidth / 1e9,
        }
    if peak:
        row["peak_bytes"] = peak
    return row | contestant.extra()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    """Bytes of tensors on the GPU at the worst moment since `_forget_peak`; 0 on the CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


COLUMNS: dict[str, Callable[[Any], str]] = {  # those that not every row has
    "tflops": lambda value: f"{value:.3g}",
    "mfu": lambda value: f"{value:.1%}",
    "bandwidth_share": lambda value: f"{value:.1%}",
    "peak_bytes": lambda value: f"{value / GIB:.2f} GiB",
    "predicted_bytes": lambda value: f"{value / GIB:.2f} GiB",
    "equal_codes": lambda value: f"{value:.2%}",
    "error": lambda value: f"{value:+.1%}",
    "data_wait_ms": lambda value: f"{value:.1f} ms",
}
HEADINGS = {
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "bandwidth_share": "bandwidth",
    "peak_bytes": "peak",
    "predicted_bytes": "predicted",
    "equal_codes": "same codes",
    "error": "error",
    "data_wait_ms": "data wait",
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
