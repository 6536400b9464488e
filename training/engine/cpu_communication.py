"""DeepSpeed's communication between CPUs: built by one process at a time, and its shared memory given back.

DeepSpeed lacks both: a build that was killed blocks all later ones, and a killed run leaves its buffers behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import time
from pathlib import Path

from training.engine.distributed import World, barrier

LOADING_SECONDS = 10.0  # more than loading a built extension takes


def load_cpu_communication() -> None:
    """Let DeepSpeed load its CPU communication, or build it the first time, in one process of this user at a time.

    torch marks a build under way by a file `lock`. A process that is killed leaves it behind, and every later run would
    wait for it without end. Whoever holds our own lock, which the system takes back from the dead, may remove it, once
    it is too old to be that of another program that loads what is built already.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / "nextscale.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        _remove_once_old(folder / "lock")
        with contextlib.redirect_stdout(io.StringIO()):
            builder.load(verbose=False)


def unlink_shared_memory(world: World) -> None:
    """Take this rank's communication buffer (66 MB) out of /dev/shm, where DeepSpeed would leave it for good.

    All ranks of the node have opened it by now, and it lives until the last of them has ended, whatever ends them.
    """
    barrier(world)
    place = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{world.rank}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{place}").unlink(missing_ok=True)


def _remove_once_old(lock: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < LOADING_SECONDS:
            time.sleep(0.1)
        lock.unlink()
