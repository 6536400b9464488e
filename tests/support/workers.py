"""Workers that share a folder: processes to fork and to kill, and what they leave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def fork(function: Callable[[], object]) -> int:
    """Run it in a child; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    finally:
        os._exit(1)


def importing(*folders: Path) -> dict[str, str]:
    """The environment for a process that imports from these folders too."""
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def ended_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def die_at(call: int) -> None:
    """Let this process be killed at that call, from now on, of those that make or remove names or bytes on disk."""
    left = [call]

    def deadly(function: Callable) -> Callable:
        def counting(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counting

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def wait_for(condition: Callable[[], bool]) -> None:
    gives_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < gives_up
        time.sleep(0.005)
