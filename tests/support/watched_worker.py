"""One rank of the runs that test_watch_faults.py starts: real launchers, a real gloo world, no engine.

Usage: watched_worker.py run=FOLDER [fault=lock|stop|silent]. The fault is rank 1's, in step 20; steps take about 50 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from launchers.setup.command_line import Command, run_launcher
from training.engine.distributed import World, join_world, sum_over_ranks
from training.supervision.stopping import Stopped, Stopping
from training.supervision.watch import Heartbeat, WatchConfig

WATCH = WatchConfig(timeout_seconds=5.0, start_seconds=60.0)
FAULTY_STEP = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    run: str
    fault: str = ""


def fail(fault: str) -> None:
    if fault == "lock":
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # or the first one would end the sleep
        ctypes.PyDLL(None).sleep(600)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "silent":
        time.sleep(600)


def launch(command: Command[Settings]) -> None:
    run = Path(command.config.run)
    world = join_world(timeout_seconds=60.0)
    stopping = Stopping(run, world)
    stopping.install()
    heartbeat = Heartbeat.start(WATCH, world, run, stopping)
    try:
        take_steps(command.config, world, stopping, heartbeat)
    finally:
        heartbeat.close()
        stopping.remove()


def take_steps(settings: Settings, world: World, stopping: Stopping, heartbeat: Heartbeat) -> None:
    """Step until somebody asks for a stop; then leave what stands for a checkpoint."""
    run, step = Path(settings.run), 0
    while not (reason := stopping.agreed()):
        step += 1
        heartbeat.beat(f"step {step}: forward")
        time.sleep(0.05)
        if world.rank == 1 and step == FAULTY_STEP:
            fail(settings.fault)
        heartbeat.beat(f"step {step}: backward")
        sum_over_ranks(torch.ones(8), world)
        heartbeat.end_start()
        (run / f"rank{world.rank}").write_text(f"{os.getpid()} {step}")
    (run / f"committed{world.rank}").write_text(str(step))
    stopping.finished()
    raise Stopped(reason, run / f"committed{world.rank}")


if __name__ == "__main__":
    run_launcher(Settings, launch, __doc__)
