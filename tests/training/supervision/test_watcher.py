"""A watcher ends what cannot end itself, makes no launcher report success for it, and touches nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import watched

from training.supervision import watcher
from training.supervision.watcher import (
    GRACE_SECONDS,
    TICK_SECONDS,
    Beat,
    Board,
    Patience,
    Process,
    ancestors,
    launcher_name,
)

SOON = 5.0  # seconds; what takes longer has not happened


class Run:
    """A tiny run under a launcher, in a folder."""

    def __init__(self, folder: Path, command: list[str], life: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*watched.PYTHON, *command, str(folder), life], stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def pid(self, name: str) -> int:
        path = self.folder / f"{name}.pid"
        assert eventually(path.exists), f"no {name}"
        return int(path.read_text())

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)

    def is_alive(self, name: str) -> bool:
        return watcher.read_stat(self.pid(name))[0] not in ("", "Z")

    def ends(self, *names: str) -> bool:
        return eventually(lambda: not any(self.is_alive(name) for name in names))

    def clean(self) -> None:
        for file in self.folder.glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Run]


def eventually(holds: Callable[[], bool], seconds: float = SOON) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def launched(life: str, *, by: str = "deepspeed") -> Run:
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        watched.write_launchers(folder)
        commands = {
            "deepspeed": [str(folder / "bin" / "deepspeed")],
            "nobody": [watched.__file__, "rank"],
        }
        runs.append(Run(folder, commands[by], life))
        runs[-1].pid("rank")
        return runs[-1]

    yield launched
    for run in runs:
        run.clean()


def test_a_rank_that_is_stopped_or_locked_is_killed_with_a_line(start: Start) -> None:
    stopped, locked = start("stopped", by="nobody"), start("locked", by="nobody")
    for run, state in ((stopped, "it is stopped"), (locked, "it does not react")):
        said = run.process.communicate(timeout=GRACE_SECONDS + 8)[1]
        assert run.process.returncode == -signal.SIGKILL
        assert said.startswith("rank 0: no progress for ") and f"while: step 12: forward; {state}; killed" in said
        assert run.ends("watcher")
    assert "its stacks are in" in said and "in rank" in (locked.folder / "stacks.txt").read_text()


def test_a_watcher_ends_with_its_rank_in_silence(start: Start) -> None:
    killed, short = start("long", by="nobody"), start("short", by="nobody")
    killed.kill("rank")
    for run, code in ((killed, -signal.SIGKILL), (short, 0)):
        assert run.process.communicate(timeout=SOON)[1] == "" and run.process.returncode == code
        assert run.ends("watcher")


def test_signals_to_a_launcher_and_all_below_leave_the_watcher_alone(start: Start) -> None:
    run = start("deaf", by="nobody")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        run.kill("watcher", number)
    time.sleep(0.2)
    assert run.is_alive("watcher") and run.is_alive("rank")


def test_a_killed_launcher_is_no_success_and_leaves_nobody(start: Start) -> None:
    run = start("long")
    run.kill("launch")
    said = run.process.communicate(timeout=SOON)[1]
    assert run.process.returncode == -signal.SIGTERM
    assert "its launcher (deepspeed.launcher.launch, pid " in said and said.count("\n") == 1
    assert run.ends("rank", "watcher")


def test_a_launcher_whose_rank_ended_well_is_a_success(start: Start) -> None:
    run = start("short")
    assert run.process.communicate(timeout=SOON) == (None, "") and run.process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_without_the_command_the_user_typed_the_rank_stops_and_the_rest_follows(
    start: Start, number: signal.Signals
) -> None:
    run = start("long")
    run.kill("runner", number)
    assert run.ends("rank", "watcher", "launch")
    assert "is gone: training stops" in run.process.communicate(timeout=SOON)[1]


def test_an_orphan_that_does_not_stop_is_killed_in_time(start: Start) -> None:
    run = start("deaf")
    run.kill("runner")
    began = time.monotonic()
    assert run.ends("rank", "watcher", "launch")
    assert watched.ORPHAN_SECONDS < time.monotonic() - began < watched.ORPHAN_SECONDS + 3
    assert "it has not stopped within 1 s" in run.process.communicate(timeout=SOON)[1]


def test_a_rank_that_stops_already_is_left_to_the_launcher_that_waits_for_it(start: Start) -> None:
    """As after Ctrl-C: the `deepspeed` command leaves at once, its launch.py waits for the last checkpoint."""
    run = start("asked")
    time.sleep(0.2)
    run.kill("runner", signal.SIGINT)
    assert run.ends("runner")
    time.sleep(watched.ORPHAN_SECONDS + 1)
    assert run.is_alive("rank") and run.is_alive("launch")


def test_a_rank_whose_launcher_died_before_it_was_watched_stops(start: Start) -> None:
    run = start("late")
    run.kill("launch")
    run.kill("runner")
    assert run.ends("rank")
    assert "rank 0: its launcher is gone" in run.process.communicate(timeout=SOON)[1]


def test_a_shell_that_is_closed_takes_nothing_with_it(tmp_path: Path) -> None:
    command = " ".join([*watched.PYTHON, watched.__file__, "rank", str(tmp_path), "plain"])
    shell = subprocess.Popen(["/bin/sh", "-c", f"{command} & wait"], stderr=subprocess.PIPE, text=True)
    run = Run.__new__(Run)
    run.folder, run.process = tmp_path, shell
    run.pid("rank")
    shell.kill()
    shell.wait()
    time.sleep(watched.ORPHAN_SECONDS + TICK_SECONDS + 0.5)
    assert run.is_alive("rank") and run.is_alive("watcher")
    run.clean()


@pytest.mark.parametrize(
    "command, name",
    [
        ("/v/bin/python /v/bin/deepspeed --num_gpus 2 train.py", "deepspeed"),
        ("/v/bin/python -u -m deepspeed.launcher.launch --world_info=x train.py", "deepspeed.launcher.launch"),
        ("/v/bin/python /v/bin/torchrun --nproc-per-node 2 train.py", "torchrun"),
        ("python3 -m torch.distributed.run train.py", "torch.distributed.run"),
        ("mpirun -n 2 python train.py", "mpirun"),
        ("python launchers/demo.py deepspeed", ""),
        ("bash -c deepspeed_train.sh", ""),
        ("python -m pytest tests -k deepspeed", ""),
        ("nohup python train.py", ""),
        ("sshd: user", ""),
    ],
)
def test_launchers_are_known_by_their_command_line(monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: "\0".join(command.split(" ")).encode() + b"\0")
    assert launcher_name(1) == name


def test_ancestors_begin_with_the_parent() -> None:
    assert ancestors(os.getpid())[0] == os.getppid()
    assert ancestors(2**22 + 1) == [] and launcher_name(2**22 + 1) == ""


def test_a_process_is_not_mistaken_for_another() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-E", "-c", "input()"], stdin=subprocess.PIPE)
    process = Process.open(child.pid)
    assert process is not None and not process.has_ended and not process.is_stopped
    child.communicate(b"\n")
    assert process.has_ended
    process.send(signal.SIGTERM)  # to nobody
    os.close(process.handle)
    assert Process.open(2**22 + 1) is None


def test_what_is_written_on_the_board_is_read_from_it() -> None:
    board = Board(-1)
    for doing in ("step 12: forward", "", "é" * 5000):
        board.write(doing, 1.5, 2.5)
        beat = board.read()
        assert (beat.time, beat.deadline) == (1.5, 2.5) and doing.startswith(beat.doing.rstrip("\ufffd"))


def test_patience_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    patience, beat = Patience(), Beat("step", 100.0, 110.0)
    assert [clock.wait(TICK_SECONDS) or patience.late(beat) for _ in range(24)][-1] == pytest.approx(2.0)


def test_patience_forgives_time_in_which_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    patience, beat = Patience(), Beat("step", 100.0, 110.0)
    clock.wait(3600)
    assert patience.late(beat) < 0
    later = Beat("step", 3701.0, 3702.0)
    clock.wait(TICK_SECONDS)
    patience.late(later)
    for _ in range(4):
        clock.wait(TICK_SECONDS)
    assert patience.late(later) > 0  # what was forgiven is forgotten with the next beat


class Clock:
    """A monotonic clock that moves when told to; it starts at 100 seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(watcher.time, "monotonic", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
