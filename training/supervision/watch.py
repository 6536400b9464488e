"""A rank that makes no progress, or whose launcher has died, ends itself with the stacks of its threads on disk.

The loop beats: it says what it begins to do, and a thread of the rank ends a rank that has been silent for too long.
That thread cannot run while C code holds the interpreter; behind it stands the timer of `faulthandler`, which can. The
thread also waits for the end of the launchers above: DeepSpeed's commands let their ranks train on when they are
killed, and report success for it. A rank that is stopped by SIGSTOP can do none of this; its launcher ends it when the
other ranks have given up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from training.engine.distributed import World
from training.supervision.stopping import Stopping

STDERR = 2
EXIT_NO_PROGRESS = 76  # EX_PROTOCOL of sysexits.h: somebody did not keep to the common step
TICK_SECONDS = 0.5
GRACE_SECONDS = 5.0  # in which the thread may end the rank, with a line and EXIT_NO_PROGRESS, before the timer does
STACKS_SECONDS = 3.0  # of these for writing the stacks: the disk may be what is stuck
ALL_SIGNALED_SECONDS = 0.3  # a signal to the whole job may reach a launcher a little before its ranks
LAUNCHERS_VARIABLES = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # which deepspeed and torchrun set for their ranks alone
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.")
LAUNCHER_COMMANDS = ("deepspeed", "deepspeed.pt", "torchrun", "accelerate", "mpirun", "mpiexec", "orterun", "prterun")


@dataclass(frozen=True)
class WatchConfig:
    """How long a rank may be silent before it is taken for stuck."""

    timeout_seconds: float = 600.0  # without progress; longer than the longest step, validation batch or file
    start_seconds: float = 1800.0  # until the first step has ended: data, weights, compilation
    orphan_seconds: float = 8.0  # that a rank whose launcher has died gets for a last checkpoint

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "start_seconds", "orphan_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"watch.{name} is {getattr(self, name)}; it must be positive")
        if self.start_seconds < self.timeout_seconds:
            raise ValueError(
                f"watch.start_seconds is {self.start_seconds}; it must not be below watch.timeout_seconds, "
                f"{self.timeout_seconds}: the first step takes longest"
            )


class Heartbeat:
    """The beats of one rank. Made by `start`, they are watched; made directly, nobody looks."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self._allowed = config.start_seconds
        self._watch: _Watch | None = None

    @classmethod
    def start(cls, config: WatchConfig, world: World, run: Path, stopping: Stopping) -> Heartbeat:
        """Begin to watch this rank, before its first long wait. run: the run folder. stopping: told of orphans."""
        heartbeat = cls(config)
        heartbeat._watch = _Watch(config, world, run.absolute(), stopping)
        heartbeat.beat("starting")
        heartbeat._watch.start()
        return heartbeat

    def beat(self, doing: str, *, allow_seconds: float | None = None) -> None:
        """Say what begins now, such as "waiting for data of step 12"; allow_seconds: that it may take, if not usual."""
        if self._watch is not None:
            self._watch.expect(doing, self._allowed if allow_seconds is None else allow_seconds)

    def end_start(self) -> None:
        """The first step has ended: from the next beat on, config.timeout_seconds count."""
        self._allowed = self.config.timeout_seconds

    def close(self) -> None:
        """End the watch. May be called twice."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None


class _Watch:
    """The thread that watches this rank, and the timer behind it."""

    def __init__(self, config: WatchConfig, world: World, run: Path, stopping: Stopping) -> None:
        self.config = config
        self.world = world
        self.stopping = stopping
        self.stacks = run / f"stacks-rank{world.rank}.txt"
        self._timers_file: int | None = None  # where the timer writes, once the run has a folder
        self._beat = ("", 0.0, 0.0)  # what is being done, since when, until when; on the monotonic clock
        self._closing = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def expect(self, doing: str, seconds: float) -> None:
        """Expect the next beat within so many seconds."""
        now = time.monotonic()
        self._beat = (doing, now, now + seconds)
        if self._timers_file is None and self.stacks.parent.is_dir():
            with contextlib.suppress(OSError):
                self._timers_file = os.open(self.stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        file = STDERR if self._timers_file is None else self._timers_file
        faulthandler.dump_traceback_later(min(seconds + GRACE_SECONDS, threading.TIMEOUT_MAX), exit=True, file=file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        os.eventfd_write(self._closing, 1)
        self._thread.join()
        os.close(self._closing)
        if self._timers_file is not None:
            is_empty = os.fstat(self._timers_file).st_size == 0
            os.close(self._timers_file)
            if is_empty:  # else it has the stacks of an earlier start
                self.stacks.unlink(missing_ok=True)

    def _look(self) -> None:
        launchers = find_launchers(os.getpid())
        orphan_until = math.inf
        if not launchers and was_launched(os.environ) and lost_its_launcher(os.getpid()):
            orphan_until = self._become_orphan()
        while self._closing not in (ready := _readable([self._closing, *launchers], TICK_SECONDS)):
            if ready and self._is_orphaned(ready, launchers) and orphan_until == math.inf:
                orphan_until = self._become_orphan()
            launchers = [launcher for launcher in launchers if launcher not in ready]
            doing, since, deadline = self._beat
            now = time.monotonic()
            if now > orphan_until:
                self._give_up(f"it has not stopped within {self.config.orphan_seconds:g} s of its launcher's end")
            if now > deadline:
                self._give_up(f"no progress for {now - since:.0f} s while: {doing}")
        for launcher in launchers:
            os.close(launcher)

    def _is_orphaned(self, dead: set[int], launchers: list[int]) -> bool:
        """Return whether this rank is to stop because some of its launchers have ended, and let those above them end.

        The `deepspeed` command reports success if the process that it waits for was killed by a signal: it must get a
        signal itself before it has found its way out. After Ctrl-C the launcher nearest to the rank waits for it.
        """
        lowest = min(launchers.index(launcher) for launcher in dead)
        for above in launchers[lowest + 1 :]:
            with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
                signal.pidfd_send_signal(above, signal.SIGTERM)
        if lowest > 0:
            time.sleep(ALL_SIGNALED_SECONDS)
        return lowest == 0 or not self.stopping.is_asked

    def _become_orphan(self) -> float:
        """Ask for a stop with a checkpoint; return the time at which this rank ends in any case."""
        self.stopping.ask(signal.SIGTERM)
        if self.world.local_rank == 0:
            seconds = self.config.orphan_seconds
            self._report(f"its launcher is gone: training stops, and is ended after {seconds:g} s")
        return time.monotonic() + self.config.orphan_seconds

    def _give_up(self, reason: str) -> None:
        """Say why, write the stacks of all threads, and end this process, whatever hangs."""
        self._report(f"{reason}; its stacks are in {self.stacks}")
        writer = threading.Thread(target=self._append, args=(all_stacks(),), daemon=True)
        writer.start()
        writer.join(STACKS_SECONDS)
        os._exit(EXIT_NO_PROGRESS)

    def _append(self, content: bytes) -> None:
        with self.stacks.open("ab") as file:
            file.write(content)

    def _report(self, line: str) -> None:
        """Write a line to stderr, unless its reader is gone or does not read: nobody must wait for that."""
        poll = select.poll()
        poll.register(STDERR, select.POLLOUT)
        with contextlib.suppress(OSError):
            if any(event & select.POLLOUT for _, event in poll.poll(0)):
                os.write(STDERR, f"rank {self.world.rank}: {line}\n".encode())


def all_stacks() -> bytes:
    """Return the stacks of all threads of this process as text, without touching a disk."""
    memory = os.memfd_create("stacks")
    faulthandler.dump_traceback(memory, all_threads=True)
    return os.pread(memory, 1 << 20, 0)


def _readable(descriptors: Iterable[int], timeout_seconds: float) -> set[int]:
    """Return those of the descriptors that have something to read, waiting for the first one."""
    poll = select.poll()  # select.select knows only numbers below 1024
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(timeout_seconds * 1000)}


def was_launched(environment: Mapping[str, str]) -> bool:
    """Return whether deepspeed or torchrun stands above this rank, or should."""
    return any(name in environment for name in LAUNCHERS_VARIABLES)


def ancestors(pid: int) -> list[int]:
    """Return the parent, its parent, and so on, up to the first process of this machine or container."""
    found: list[int] = []
    while pid > 0:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])  # names may hold blanks and brackets
        found += [pid] if pid > 0 else []
    return found


def is_launcher(pid: int) -> bool:
    """Return whether a process is a launcher of ranks; a shell whose command names one is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    for place, word in enumerate(words[:6]):  # behind interpreters and their options
        if place > 0 and words[place - 1] == "-m" and word.startswith(LAUNCHER_MODULES):
            return True
        if os.path.basename(word) in LAUNCHER_COMMANDS:
            return True
        if place > 0 and not word.startswith("-"):
            return False  # a script or command that is none of these; what follows are its arguments
    return False


def find_launchers(pid: int) -> list[int]:
    """Return the launchers above a process, the nearest first, as pidfds: readable once the process has ended."""
    found: list[int] = []
    for above in filter(is_launcher, ancestors(pid)):
        with contextlib.suppress(OSError):
            found.append(os.pidfd_open(above))
    return found


def lost_its_launcher(pid: int) -> bool:
    """Return whether no ancestor can be the Python program that launched this process: it has died already."""
    return not any(is_launcher(above) or _runs_our_python(above) for above in ancestors(pid))


def _runs_our_python(pid: int) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/exe", sys.executable)
    except OSError:
        return False
