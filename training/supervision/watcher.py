"""The process that watches one rank from outside: one that is stopped or locked cannot end itself, an orphan does not.

`training.supervision.watch` starts it beside every rank. It reads the rank's beats from memory that both share, kills a rank that
has been silent for too long, and ends a rank whose launcher has died. It imports the standard library alone, so that it
starts in milliseconds and is small, and it ends with its rank.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICK_SECONDS = 0.5
NOTICED_PAUSE_SECONDS = 2.0  # a tick that comes this much too late: we were stopped ourselves
GRACE_SECONDS = 2.0  # in which the rank's own thread may end it, with a better exit code than a kill
STACKS_SECONDS = 0.5  # for writing the stacks before the kill
LAUNCHER_MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.")
LAUNCHER_NAMES = ("deepspeed", "deepspeed.pt", "torchrun", "accelerate", "mpirun", "mpiexec", "orterun", "prterun")
ALL_SIGNALED_SECONDS = 0.3  # a signal to the whole job may reach a launcher a little before its ranks
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Launchers signal all processes below them; a watcher ends with its rank. Who starts one blocks these beforehand.
IGNORED_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Beat:
    """What a rank was doing at `time`, and until when it need not say more; seconds of the monotonic clock."""

    doing: str
    time: float
    deadline: float


class Board:
    """One page of memory that a rank writes its beats to and others read, through a file descriptor."""

    SIZE = 4096
    _HEAD = struct.Struct("ddI")

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def write(self, doing: str, now: float, deadline: float) -> None:
        text = doing.encode(errors="replace")[: self.SIZE - self._HEAD.size]
        self._memory[self._HEAD.size : self._HEAD.size + len(text)] = text
        self._HEAD.pack_into(self._memory, 0, now, deadline, len(text))

    def read(self) -> Beat:
        moment, deadline, length = self._HEAD.unpack_from(self._memory)
        text = self._memory[self._HEAD.size : self._HEAD.size + length]
        return Beat(text.decode(errors="replace"), moment, deadline)


class Patience:
    """How late a rank is. Time in which the judge itself did not run does not count: then the whole job was stopped."""

    def __init__(self) -> None:
        self._last_beat = self._last_look = time.monotonic()
        self._forgiven = 0.0

    def forgive(self, seconds: float) -> None:
        self._forgiven += seconds

    def late(self, beat: Beat) -> float:
        """Seconds since the deadline; negative before it. To be called every TICK_SECONDS."""
        now = time.monotonic()
        if beat.time != self._last_beat:
            self._last_beat, self._forgiven = beat.time, 0.0
        pause = now - self._last_look - TICK_SECONDS
        if pause > NOTICED_PAUSE_SECONDS:
            self.forgive(pause)
        self._last_look = now
        return now - beat.deadline - self._forgiven


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with its number."""

    pid: int
    handle: int  # a pidfd, readable once the process has ended
    name: str = ""

    @classmethod
    def open(cls, pid: int, name: str = "") -> Process | None:
        """None if there is no such process."""
        try:
            return cls(pid, os.pidfd_open(pid), name)
        except OSError:
            return None

    @property
    def has_ended(self) -> bool:
        return bool(readable([self.handle], 0.0))

    @property
    def is_stopped(self) -> bool:
        return read_stat(self.pid)[0] in ("T", "t")

    def send(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self.handle, number)
        except OSError:
            pass  # it has ended, or belongs to somebody else


def readable(descriptors: Iterable[int], timeout_seconds: float) -> set[int]:
    """Those of the descriptors that have something to read, waiting for the first one. No limit on their numbers."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(timeout_seconds * 1000)}


def say_if_heard(text: str) -> None:
    """A line on stderr, unless its reader is gone or does not read: nobody must wait for that."""
    poll = select.poll()
    poll.register(sys.stderr.fileno(), select.POLLOUT)
    try:
        if any(event & select.POLLOUT for _, event in poll.poll(0)):
            os.write(sys.stderr.fileno(), f"{text}\n".encode())
    except OSError:
        pass


def read_stat(pid: int) -> tuple[str, int]:
    """The state letter and the parent of a process; ("", 0) if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # names may hold blanks and brackets
    except OSError:
        return "", 0
    return fields[0], int(fields[1])


def ancestors(pid: int) -> list[int]:
    """The parent, its parent, and so on, up to the first process of this machine or container."""
    found: list[int] = []
    while (pid := read_stat(pid)[1]) > 0:
        found.append(pid)
    return found


def launcher_name(pid: int) -> str:
    """How a process is called if it starts ranks, "" if it is anything else, such as a shell."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    for place, word in enumerate(words[:6]):  # behind interpreters and their options
        if place > 0 and words[place - 1] == "-m" and word.startswith(LAUNCHER_MODULES):
            return word
        if os.path.basename(word) in LAUNCHER_NAMES:
            return os.path.basename(word)
        if place > 0 and not word.startswith("-"):
            return ""  # a script or command that is none of these; what follows are its arguments
    return ""


def find_launchers(pid: int) -> list[Process]:
    """The launchers above a process, the nearest first."""
    named = [(above, launcher_name(above)) for above in ancestors(pid)]
    return [found for above, name in named if name and (found := Process.open(above, name)) is not None]


def lost_its_launcher(pid: int) -> bool:
    """Whether nobody above `pid` can be the Python program that launched it: a launcher that has already died."""
    above = ancestors(pid)
    return bool(above) and not any(launcher_name(other) or _runs_our_python(other) for other in above)


def _runs_our_python(pid: int) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/exe", sys.executable)
    except OSError:
        return False


@dataclass(frozen=True)
class Orders:
    """What a watcher is told on its command line. Descriptors are inherited."""

    pid: int
    handle: int  # a pidfd of the rank
    board: int
    signals: int  # a pipe that brings the numbers of the signals which the rank receives
    stacks: int  # the file to which SIGQUIT makes the rank write its stacks
    stacks_path: str
    rank: int
    orphan_seconds: float
    was_launched: bool  # by a program that sets the environment of ranks
    speaks: bool  # about what all ranks of the node see


class Watcher:
    """Watches until the rank has ended."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.rank = Process(orders.pid, orders.handle)
        self.board = Board(orders.board)
        self.patience = Patience()
        self.launchers = find_launchers(orders.pid)
        self.stop_was_asked = False
        self.kill_at: float | None = None  # when an orphan's time is over

    def run(self) -> None:
        if not self.launchers and self.orders.was_launched and lost_its_launcher(self.orders.pid):
            self._become_orphan("its launcher")
        while not self.rank.has_ended:
            ready = self._wait()
            if self.rank.handle in ready:
                return  # then its launchers' end is in order
            if self.orders.signals in ready:
                self._note_signals()
            dead = [launcher for launcher in self.launchers if launcher.handle in ready]
            if dead:
                self._lose_launchers(dead)
            if self.kill_at is not None and time.monotonic() > self.kill_at:
                self._kill(f"it has not stopped within {self.orders.orphan_seconds:g} s of its launcher's end")
            self._judge()

    def _wait(self) -> set[int]:
        launchers = [launcher.handle for launcher in self.launchers]
        return readable([self.rank.handle, self.orders.signals, *launchers], TICK_SECONDS)

    def _note_signals(self) -> None:
        if readable([self.orders.signals], 0.0):
            self.stop_was_asked |= any(number in STOP_SIGNALS for number in os.read(self.orders.signals, 4096))

    def _lose_launchers(self, dead: list[Process]) -> None:
        # First, and at once: the `deepspeed` command reports success if the process that it waits for was killed by a
        # signal. It must get a signal itself before it has found its way out.
        above = self.launchers[self.launchers.index(dead[0]) + 1 :]
        for launcher in above:
            launcher.send(signal.SIGTERM)
        self.launchers = [launcher for launcher in self.launchers if launcher not in dead and not launcher.has_ended]
        below = [launcher for launcher in self.launchers if launcher not in above]
        if below:
            time.sleep(ALL_SIGNALED_SECONDS)
            self._note_signals()
            if self.stop_was_asked:
                return  # as after Ctrl-C: the launcher nearest to the rank waits for it, and ends it if it must
        self._become_orphan(f"its launcher ({dead[0].name}, pid {dead[0].pid})")

    def _become_orphan(self, launcher: str) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + self.orders.orphan_seconds
            if not self.stop_was_asked:
                self.rank.send(signal.SIGTERM)
            if self.orders.speaks:
                self._say(f"{launcher} is gone: training stops, and is killed after {self.orders.orphan_seconds:g} s")

    def _judge(self) -> None:
        """Kill the rank if it has been silent for too long and its own thread has not ended it."""
        if self.launchers and self.launchers[0].is_stopped:
            self.patience.forgive(TICK_SECONDS)  # somebody has suspended the whole run
        beat = self.board.read()
        late = self.patience.late(beat)
        if late > 0 and (late > GRACE_SECONDS or self.rank.is_stopped):
            state = "it is stopped" if self.rank.is_stopped else "it does not react"
            silence = time.monotonic() - beat.time
            self._kill(f"no progress for {silence:.0f} s while: {beat.doing}; {state}")

    def _kill(self, reason: str) -> None:
        self.rank.send(signal.SIGQUIT)
        time.sleep(STACKS_SECONDS)
        self.rank.send(signal.SIGKILL)
        if self.kill_at is not None:
            for launcher in self.launchers:
                launcher.send(signal.SIGTERM)  # an orphan too; it would notice only a little later
        stacks = os.pread(self.orders.stacks, 1 << 20, 0)
        self._say(f"{reason}; killed{f', its stacks are in {self.orders.stacks_path}' if stacks else ''}")
        if stacks:
            Path(self.orders.stacks_path).write_bytes(stacks)  # last, because the disk may be what is stuck
        sys.exit()

    def _say(self, text: str) -> None:
        say_if_heard(f"rank {self.orders.rank}: {text}")


def main() -> None:
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    Watcher(Orders(**json.loads(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
