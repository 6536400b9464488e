"""Stopping with a checkpoint: a signal to any rank, or a file, stops all ranks after the same step.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (what schedulers send ahead of a time limit), SIGHUP (a closed terminal) and a file
named `stop` in the run folder ask for it. The request of one rank reaches the others by a reduction that is read one
step after it was started, so that nobody waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from data_pipeline.files.signals import STOP_SIGNALS
from training.engine.distributed import World

SAME_REQUEST_SECONDS = 2.0  # Ctrl-C reaches a rank from the terminal, then once more from its launcher
LOOK_SECONDS = 0.2  # between two looks for the stop file: it lies on storage that may be slow
STOP_FILE = "stop"
_STOP_FILE_WISH = 1  # above: signal number + 1
_RANKS = 1 << 20


class Stopped(Exception):
    """The run was asked to stop, and did: everything up to `checkpoint` is on disk."""

    exit_code: ClassVar[int] = 75

    def __init__(self, reason: str, checkpoint: Path) -> None:
        super().__init__(f"stopped: {reason}; checkpoint {checkpoint}; the same command goes on from there")
        self.reason = reason
        self.checkpoint = checkpoint


@dataclass
class Stopping:
    """Whether this run is asked to stop. `run` is its folder. Without `install` signals keep their usual meaning."""

    run: Path
    world: World
    _signal: int = 0  # the first that asked for a stop
    _signal_time: float = 0.0
    _next_look: float = 0.0  # at which to look for the stop file again
    _sees_file: bool = False
    _group: dist.ProcessGroup | None = None
    _underway: _Reduction | None = None
    _is_finished: bool = False
    _earlier: dict[int, Any] = field(default_factory=dict)  # handlers, by signal

    def install(self) -> None:
        """Let signals ask for a stop, from now on, in the main thread.

        One that was ignored, as a shell does with SIGINT behind `&`, is heard; but not SIGHUP, which nohup ignores so
        that the run outlives its terminal.
        """
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._earlier[number] = signal.signal(number, self._receive)

    def remove(self) -> None:
        """Put the handlers of before back."""
        while self._earlier:
            number, handler = self._earlier.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def is_asked(self) -> bool:
        """Tell whether this rank itself was asked to stop by a signal."""
        return self._signal != 0

    def ask(self, number: int) -> None:
        """Ask for a stop as a first signal of this number would; from any thread. A later request changes nothing."""
        if not self._signal:
            self._signal, self._signal_time = number, time.monotonic()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; end the process on the spot for one that comes later than an echo of the first."""
        if self._is_finished:  # a launcher ends what it takes for stragglers
            return
        name = signal.Signals(number).name
        if not self._signal:
            self.ask(number)
            self._write(f"{name}: training stops after this step, with a checkpoint; a second signal ends it at once")
        elif time.monotonic() - self._signal_time > SAME_REQUEST_SECONDS:
            self._write(f"{name} again: ended at once, without a checkpoint")
            os._exit(128 + number)

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; not print: the signal may have come in one
            os.write(2, f"rank {self.world.rank}: {line}\n".encode())

    def agreed(self) -> str:
        """Return why the run is to stop, the same on all ranks after the same step, or "". A collective, once a step.

        On several ranks the answer is that of one step before.
        """
        if self.world.world_size == 1:
            return self._reason(self._wish())
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # on GPUs too: it stalls none, and cannot cross NCCL's order
        earlier, self._underway = self._underway, _Reduction(self._wish(), self._group)
        return self._reason(earlier.result() if earlier else 0)

    def finished(self) -> None:
        """The run has ended and all is saved: take no more requests, remove the stop file."""
        self._is_finished = True
        if self.world.is_rank_zero:
            try:
                (self.run / STOP_FILE).unlink(missing_ok=True)
            except OSError as error:
                print(f"{self.run / STOP_FILE}: {error.strerror}; remove it before the next start", file=sys.stderr)

    def _wish(self) -> int:
        """Return what this rank asks for, as a number; 0 for nothing. Of all wishes the largest is granted."""
        kind = self._signal + 1 if self._signal else _STOP_FILE_WISH if self._looks_stopped() else 0
        return kind * _RANKS + self.world.rank if kind else 0

    def _looks_stopped(self) -> bool:
        """Return whether the stop file is there; rank 0 looks for it, and not at every step."""
        if self.world.is_rank_zero and not self._sees_file and time.monotonic() >= self._next_look:
            self._sees_file = (self.run / STOP_FILE).exists()
            self._next_look = time.monotonic() + LOOK_SECONDS
        return self._sees_file

    def _reason(self, wish: int) -> str:
        kind, rank = divmod(wish, _RANKS)
        if kind <= _STOP_FILE_WISH:
            return f"{self.run / STOP_FILE} was made" if kind else ""
        return f"{signal.Signals(kind - 1).name} on rank {rank}"


class _Reduction:
    """The largest of all ranks' numbers, on its way."""

    def __init__(self, number: int, group: dist.ProcessGroup) -> None:
        self._number = torch.tensor([number])
        self._work = dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def result(self) -> int:
        """Wait for all ranks, if they have not been here yet, and return the largest number."""
        self._work.wait()
        return int(self._number)
