"""A rank that makes no progress ends itself, and says what it was doing and which rank is behind.

The loop beats: it writes what it begins to do to memory. A thread of the rank looks at the beats and ends a rank that
has been silent for too long, with the stacks of all its threads on disk. What a thread cannot see (a stopped process,
a locked interpreter, a dead launcher) is left to a process of its own, `training.supervision.watcher`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.strict_json import read_json
from training.engine.distributed import World
from training.supervision import watcher
from training.supervision.watcher import Beat, Board, Orders, Patience, say_if_heard

EXIT_NO_PROGRESS = 76  # EX_PROTOCOL of sysexits.h: somebody did not keep to the common step
LAUNCHERS_VARIABLES = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # which deepspeed and torchrun set for their ranks alone
REPORT_SECONDS = 10.0  # between two reports of a rank to the run folder, in a small world
REPORTS_PER_SECOND = 8.0  # of all ranks of a large one


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

    def __init__(self, config: WatchConfig, board: Board | None = None) -> None:
        self.config = config
        self._allowed = config.start_seconds
        self._board = board or Board(-1)
        self._watch: _Watch | None = None
        self.beat("starting")

    @classmethod
    def start(cls, config: WatchConfig, world: World, run: Path) -> Heartbeat:
        """Begin to watch this rank; in the main thread, before its first long wait. `run` is the run folder."""
        memory = os.memfd_create("beats")
        try:
            os.ftruncate(memory, Board.SIZE)
            board = Board(memory)
            heartbeat = cls(config, board)
            heartbeat._watch = _Watch(config, world, run.absolute(), board, memory)
        finally:
            os.close(memory)
        return heartbeat

    def beat(self, doing: str, *, allow_seconds: float | None = None) -> None:
        """Say what begins now, such as "waiting for data of step 12"; allow_seconds: that it may take, if not usual."""
        now = time.monotonic()
        self._board.write(doing, now, now + (self._allowed if allow_seconds is None else allow_seconds))

    def end_start(self) -> None:
        """The first step has ended: from the next beat on, config.timeout_seconds count."""
        self._allowed = self.config.timeout_seconds

    def close(self) -> None:
        """End the watch. May be called twice."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None


class _Watch:
    """The thread and the process that watch this rank."""

    def __init__(self, config: WatchConfig, world: World, run: Path, board: Board, memory: int) -> None:
        self.world = world
        self.board = board
        self.reports = Reports(run / "heartbeats", world, timeout_seconds=config.timeout_seconds)
        self.stacks_path = run / f"stacks-rank{world.rank}.txt"
        self._signals, self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._earlier_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._stacks = os.memfd_create("stacks")
        faulthandler.register(signal.SIGQUIT, file=self._stacks, all_threads=True)
        self._process = self._start_watcher(config, memory)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def _start_watcher(self, config: WatchConfig, memory: int) -> subprocess.Popen[bytes]:
        handle = os.pidfd_open(os.getpid())
        orders = Orders(
            pid=os.getpid(),
            handle=handle,
            board=memory,
            signals=self._signals,
            stacks=self._stacks,
            stacks_path=str(self.stacks_path),
            rank=self.world.rank,
            orphan_seconds=config.orphan_seconds,
            was_launched=was_launched(os.environ),
            speaks=self.world.local_rank == 0,
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, watcher.IGNORED_SIGNALS)  # the child inherits that
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", watcher.__file__, json.dumps(dataclasses.asdict(orders))],
                pass_fds=(handle, memory, self._signals, self._stacks),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # or Ctrl-C would reach it
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(handle)

    def _look(self) -> None:
        patience = Patience()
        next_report = 0.0
        while not self._closed.wait(watcher.TICK_SECONDS):
            beat = self.board.read()
            if patience.late(beat) > 0:
                self._give_up(beat)
            if time.monotonic() >= next_report:
                self.reports.write(beat)
                next_report = time.monotonic() + self.reports.every_seconds

    def _give_up(self, beat: Beat) -> None:
        silence = time.monotonic() - beat.time
        say_if_heard(f"rank {self.world.rank}: no progress for {silence:.0f} s while: {beat.doing}")
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        if behind := self.reports.behind(beat):
            say_if_heard(f"rank {self.world.rank}: {behind}")
        try:
            self.stacks_path.write_bytes(os.pread(self._stacks, 1 << 20, 0))
            say_if_heard(f"rank {self.world.rank}: its stacks are in {self.stacks_path}")
        finally:
            os._exit(EXIT_NO_PROGRESS)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._process.kill()
        self._process.wait()
        signal.set_wakeup_fd(self._earlier_wakeup)
        faulthandler.unregister(signal.SIGQUIT)
        for descriptor in (self._signals, self._wakeup, self._stacks):
            os.close(descriptor)
        self.reports.remove()


def was_launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher stands above this rank, or should."""
    return any(name in environment for name in LAUNCHERS_VARIABLES)


class Reports:
    """What the ranks were last seen doing: one small file each, in a folder that all see."""

    def __init__(self, folder: Path, world: World, *, timeout_seconds: float) -> None:
        self.folder = folder
        self.world = world
        self.made = [each for each in (folder, *folder.parents) if not each.exists()]  # the deepest first
        self.every_seconds = max(min(REPORT_SECONDS, timeout_seconds / 4), world.world_size / REPORTS_PER_SECOND)

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def write(self, beat: Beat) -> None:
        """Say what this rank is doing. A disk that is full or gone stops nobody."""
        path = self._path(self.world.rank)
        temporary = path.with_suffix(".tmp")
        said = {"rank": self.world.rank, "doing": beat.doing, "since": time.time() - (time.monotonic() - beat.time)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(said))
            os.replace(temporary, path)
        except OSError:
            pass

    def behind(self, beat: Beat) -> str:
        """The rank whose last beat is the oldest, in words; "" if it is this one, or not known."""
        now = time.time()
        oldest = now - (time.monotonic() - beat.time)
        found = ""
        for rank in range(self.world.world_size):
            try:
                said = read_json(self._path(rank))
                since = float(said["since"])
            except (OSError, ValueError, TypeError, KeyError):
                continue
            if rank != self.world.rank and since < oldest:
                oldest = since
                found = f"rank {rank} was last seen {now - oldest:.0f} s ago: {said.get('doing')}"
        return found

    def remove(self) -> None:
        """Forget this rank, and its folder once that is empty; so, too, those above it that were made for it alone."""
        try:
            self._path(self.world.rank).unlink(missing_ok=True)
            for each in self.made or [self.folder]:
                each.rmdir()
        except OSError:
            pass  # others are still there, or the run is
