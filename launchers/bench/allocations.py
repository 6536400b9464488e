"""Bytes of tensors that are allocated, and the most there were between two marks: on the CPU and on CUDA.

On CUDA torch's allocator counts. On the CPU nobody does; there torch's profiler writes down every allocation of torch's
CPU allocator, those inside operators and in the backward pass too, and the trace is read back. It slows work down: this
is for sizes, not for times.
"""

from __future__ import annotations

import gc
import json
import tempfile
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MEMORY = "[memory]"  # an allocation or a deallocation in the profiler's trace
MARK = "nextscale mark "  # how marks are told from what else the trace has


@dataclass(frozen=True)
class Phase:
    """What lay between the mark before and the mark `name`."""

    name: str
    live: int  # bytes at the mark, beyond those at the recorder's start
    peak: int  # the most since the mark before, likewise


class AllocationRecorder:
    """In `with AllocationRecorder() as recorder`, `recorder.mark(name)` ends a phase; `phases` are there afterwards.

    Only what is allocated within counts, so the model must be built inside. (On CUDA what was allocated before and is
    freed within counts as negative.)
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._on_cuda = torch.cuda.is_available()
        self._profile = None if self._on_cuda else profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> AllocationRecorder:
        gc.collect()  # what earlier work has left must not be in the way, nor be freed later
        if self._profile is not None:
            self._profile.__enter__()
        else:
            torch.cuda.synchronize()
            self._start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        return self

    def mark(self, name: str) -> None:
        """End the phase that began with the mark before, or with the recorder."""
        if self._profile is not None:
            with record_function(MARK + name):
                pass
            return
        torch.cuda.synchronize()
        live, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        self.phases.append(Phase(name, live - self._start, peak - self._start))
        torch.cuda.reset_peak_memory_stats()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, trace)
            if kind is None:
                self.phases = _phases_of(_read_trace(self._profile))


class _Blocks:
    """Blocks of memory that are allocated, as far as the profiler has seen.

    A block that another thread frees, such as one of gloo's that holds the last reference to what it has sent, is not
    reported. It is known to be gone when a new block lies where it was.
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
        """Nothing happens if the block was allocated before the recorder began."""
        if start in self._sizes:
            self.live -= self._sizes.pop(start)
            self._starts.pop(bisect_left(self._starts, start))


def _phases_of(trace: list[dict[str, Any]]) -> list[Phase]:
    """Replay allocations and marks of a profiler's trace in the order of time."""
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


def _read_trace(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]
