"""Freed memory is kept where the C library can, and the process goes on where it cannot."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from training.host_memory import keep_freed_memory

# page faults of the second of two large allocations, with the first one freed
FAULTS = """
import resource, sys
import torch
from training.host_memory import keep_freed_memory
assert len(sys.argv) == 1 or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is glibc's setting")
def test_what_is_freed_comes_back_without_page_faults() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *given], capture_output=True, text=True, check=True).stdout)
        for given in ([], ["kept"])
    )
    assert kept < plain / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
