"""Count the bytes of tensors that are allocated, and the most there were between two marks, on the CPU and on CUDA.

On CUDA torch's allocator counts. On the CPU torch's profiler writes down every allocation of torch's CPU allocator,
those inside operators and in the backward pass too, and its trace is replayed.
"""

from __future__ import annotations

import gc
import json
import tempfile
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEMORY = "[memory]"  # an allocation or a deallocation in the profiler's trace
MARK = "nextscale mark "  # tells marks from the other events of the trace


@dataclass(frozen=True)
class Phase:
    """What lay between the mark before and the mark `name`."""

    name: str
    live: int  # bytes at the mark, beyond those at the recorder's start
    peak: int  # the most since the mark before, likewise


class AllocationRecorder:
    """Record phases: in `with AllocationRecorder() as recorder`, `recorder.mark(name)` ends one.

    `phases` are there afterwards. The model must be built inside: only what is allocated there counts.
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> AllocationRecorder:
        gc.collect()  # what earlier work has left must not be freed inside
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profile.__enter__()
        return self

    def mark(self, name: str) -> None:
        """End the phase that began with the mark before, or with the recorder."""
        if not torch.cuda.is_available():
            with record_function(MARK + name):
                return
        torch.cuda.synchronize()
        live, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        self.phases.append(Phase(name, live - self._start, peak - self._start))
        torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *error: Any) -> None:
        if torch.cuda.is_available():
            return
        self._profile.__exit__(*error)
        with tempfile.NamedTemporaryFile(suffix=".json") as trace:
            self._profile.export_chrome_trace(trace.name)
            self.phases = _replay(json.loads(Path(trace.name).read_text())["traceEvents"])


class _Blocks:
    """The blocks of memory that are allocated, as far as the profiler has seen.

    It does not report a block that another thread frees, such as gloo's. Such a block is known to be gone when a new
    one lies where it was.
    """

    def __init__(self) -> None:
        self.live = 0
        self._starts: list[int] = []  # sorted
        self._sizes: dict[int, int] = {}

    def allocate(self, start: int, size: int) -> None:
        first = bisect_left(self._starts, start)
        if first and self._starts[first - 1] + self._sizes[self._starts[first - 1]] > start:
            first -= 1
        for gone in self._starts[first : bisect_left(self._starts, start + size)]:
            self.free(gone)
        insort(self._starts, start)
        self._sizes[start] = size
        self.live += size

    def free(self, start: int) -> None:
        if start in self._sizes:  # else it was allocated before the recorder began
            self.live -= self._sizes.pop(start)
            self._starts.pop(bisect_left(self._starts, start))


def _replay(trace: list[dict[str, Any]]) -> list[Phase]:
    phases: list[Phase] = []
    blocks, peak = _Blocks(), 0
    for event in sorted(filter(_matters, trace), key=lambda event: event["ts"]):
        if event["name"] != MEMORY:
            phases.append(Phase(event["name"].removeprefix(MARK), blocks.live, peak))
            peak = blocks.live
        elif event["args"]["Bytes"] > 0:
            blocks.allocate(event["args"]["Addr"], event["args"]["Bytes"])
            peak = max(peak, blocks.live)
        else:
            blocks.free(event["args"]["Addr"])
    return phases


def _matters(event: dict[str, Any]) -> bool:
    name = str(event.get("name"))
    return name == MEMORY or (name.startswith(MARK) and event.get("ph") == "X")
