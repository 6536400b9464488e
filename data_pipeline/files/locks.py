"""Locks that end with the process that holds them, whatever ends it: the kernel's flock."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def take_lock(path: Path) -> int | None:
    """Lock a file, made if need be, without waiting.

    Returns a descriptor that holds the lock until it is closed, here and in processes that inherit it, or None if
    another process holds it. On a file system without locks every caller gets a descriptor.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor
