"""One run of a scaling study as a process of its own: started, asked to stop, understood when it ends.

The run outlives the study's process if that is killed. It holds the lock of its run folder as long as it lives, so that
whoever comes next waits for it instead of starting a second one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.files.locks import take_lock
from launchers.study.state import PlannedRun
from training.supervision.stopping import STOP_FILE

LOG, LOCK = "log.txt", ".run.lock"
TRAIN = Path(__file__).resolve().parent / "train.py"
HEADING = "=== "  # of each start in it
LAST_BYTES = 4096  # of a log, in which a run says why it has ended


def is_trained_elsewhere(run: PlannedRun) -> bool:
    """Whether a process that an earlier command has started still trains the run."""
    if not (run.folder / LOCK).exists():
        return False
    descriptor = take_lock(run.folder / LOCK)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def command_line(start: Sequence[str], run: PlannedRun) -> list[str]:
    """The command that trains a run; programs of this Python's environment come first.

    Raises:
        ValueError: there is no such program.
    """
    if not start:
        raise ValueError("start is empty; give the command before launchers/train.py: deepspeed, or python")
    beside = Path(sys.executable).with_name(start[0])
    program = str(beside) if beside.is_file() else shutil.which(start[0])
    if program is None:
        raise ValueError(f"start is {' '.join(start)}, but {start[0]} is not found; install it, or start with python")
    return [program, *start[1:], str(TRAIN), *run.arguments]


def ask_to_stop(run: PlannedRun) -> None:
    """Let a run save and end after its step, on whatever nodes its ranks are."""
    (run.folder / STOP_FILE).touch()


class TrainingProcess:
    """A run that is being trained; its output goes to log.txt of its folder.

    Raises:
        BlockingIOError: another process trains it.
        OSError: it cannot be started.
    """

    def __init__(self, start: Sequence[str], run: PlannedRun) -> None:
        command = command_line(start, run)
        self.run = run
        lock = take_lock(run.folder / LOCK)
        if lock is None:
            raise BlockingIOError(f"{run.folder}: another process trains this run; wait for it")
        try:
            (run.folder / STOP_FILE).unlink(missing_ok=True)  # of somebody who was killed before it was read
            with (run.folder / LOG).open("ab") as log:
                log.write(f"{HEADING}{time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(command)}\n".encode())
                log.flush()
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C is for the study, which hands it on once
                )
        finally:
            os.close(lock)

    def exit_code(self) -> int | None:
        """The code that it has ended with, 128 + N for signal N; None while it runs."""
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def close(self) -> None:
        """Take back a wish that it has not seen; if it still runs, let it save and end by itself."""
        if self._process.poll() is None:
            ask_to_stop(self.run)
        else:
            (self.run.folder / STOP_FILE).unlink(missing_ok=True)


def last_words(run: PlannedRun) -> str:
    """Why a run has ended, by its log: the last line that is an error, else the last line."""
    try:
        with (run.folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            text = file.read().decode(errors="replace").rpartition(HEADING)[2]
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]  # the first is the heading's
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no word of its own"])[-1]
