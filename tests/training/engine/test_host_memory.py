"""Freed memory is kept where the C library can, and the process goes on where it cannot."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from training.engine import host_memory

# Page faults of later rounds, each of which takes and frees the same large blocks as a step does. Of several blocks: a
# small one beside a freed one can make it too small for the next one, so that a single size may grow once.
FAULTS = """
import resource, sys
from training.engine.host_memory import keep_freed_memory
assert len(sys.argv) == 1 or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"1" * (mebibytes * 2**20) for mebibytes in (64, 40, 96, 33, 7, 48)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(6)][2:]))
"""


def has_glibc_of_2_35() -> bool:
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)


@pytest.mark.skipif(not has_glibc_of_2_35(), reason="earlier versions keep no blocks above 32 MiB")
def test_what_is_freed_comes_back_without_page_faults() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, *given], capture_output=True, text=True, check=True).stdout)
        for given in ([], ["kept"])
    )
    assert kept < plain / 2


def test_an_older_c_library_keeps_smaller_blocks_and_another_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Older:
        def mallopt(self, name: int, value: int) -> int:
            taken.append(value)
            return value != host_memory.LARGEST_KEPT_BLOCKS[0]

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Older())
    assert host_memory.keep_freed_memory()
    assert taken == [*host_memory.LARGEST_KEPT_BLOCKS, host_memory.KEPT_AT_THE_END]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert host_memory.keep_freed_memory() is False
