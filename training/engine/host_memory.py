"""Memory on the CPU that is freed and taken again at every step is kept instead of being given back to the system.

A training step allocates the same large tensors each time. The C library returns those above 32 MiB to the system at
once, and every page then comes back by a page fault, which can cost more than the arithmetic on it: a fill of 128 MiB
was seen to take 92 ms with the pages new and 16 ms with them kept (two virtual cores, no huge pages).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGEST_KEPT_BLOCKS = (2**30, 2**25)  # bytes; glibc before 2.35 refuses the first
KEPT_AT_THE_END = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what this process frees; False where it refuses, or the C library is another."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    keeps_blocks = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT_BLOCKS)
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_AT_THE_END)) and keeps_blocks
