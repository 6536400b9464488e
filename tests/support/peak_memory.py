"""Measure how much memory a call takes at its peak, beyond what the process has before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

BOUND = 256 * 2**20  # bytes above the baseline; the promise for whatever is read


def peak_memory(call: Callable[[], object]) -> int:
    """Return the bytes of resident memory that a call adds at its peak; what it raises is raised here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be there to be used again unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
