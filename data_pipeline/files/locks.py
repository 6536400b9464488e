"""Locks that end with the process that holds them, whatever ends it: the kernel's flock.

The library filelock gives out no descriptor that a child process could inherit. Where a file system has no locks it
takes a file for one, which stays when its process is killed and then blocks everybody.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def take_lock(path: Path) -> int | None:
    """Lock a file, made if need be, without waiting, and return a descriptor that holds the lock.

    None: another descriptor holds it, of this process or another. The lock ends when the descriptor is closed, here
    and in processes that inherited it. On a file system without locks every caller gets a descriptor.
    """
    with suppress(FileExistsError):  # mkdir looks again, and others may have removed the folder by then
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # other users of a shared folder lock it too
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def has_locks(descriptor: int) -> bool:
    """Tell whether the file system has locks, by a descriptor that `take_lock` returned: taking it again succeeds."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def release_lock(descriptor: int) -> None:
    """Give a lock back, also when a process forked meanwhile still has the descriptor open."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
