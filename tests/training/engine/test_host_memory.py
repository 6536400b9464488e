"""Freed memory is kept where the C library can, and the process goes on where it cannot."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from training.engine.host_memory import (
    KEPT_AT_THE_END,
    LARGEST_KEPT_BLOCKS,
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    keep_freed_memory,
)


def keeps_large_blocks() -> bool:
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)


# Page faults of later rounds, each of which takes and frees the same large blocks as a step does. Of several blocks: a
# small one beside a freed one can make it too small for the next aligned one, so that a single size may grow once.
FAULTS = """
import resource, sys
import torch
from training.engine.host_memory import keep_freed_memory
assert len(sys.argv) == 1 or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(mebibytes * 2**20, dtype=torch.uint8).fill_(1)
              for mebibytes in (64, 40, 96, 33, 7, 128, 48)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(8)][2:]))
"""


@pytest.mark.skipif(not keeps_large_blocks(), reason="this is glibc's setting, for blocks above 32 MiB from 2.35 on")
def test_what_is_freed_comes_back_without_page_faults() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *given], capture_output=True, text=True, check=True).stdout)
        for given in ([], ["kept"])
    )
    assert kept < plain / 2


class Recorded:
    """A C library that refuses the first size, as older ones do."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, int]] = []

    def mallopt(self, name: int, value: int) -> int:
        if value == LARGEST_KEPT_BLOCKS[0]:
            return 0
        self.taken.append((name, value))
        return 1


def test_an_older_c_library_keeps_smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Recorded()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert keep_freed_memory()
    assert library.taken == [(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCKS[1]), (M_TRIM_THRESHOLD, KEPT_AT_THE_END)]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
