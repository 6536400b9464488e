"""Launchers and ranks are killed, stopped and locked while two ranks run: nobody is left, and nobody says success.

`make test-faults` prints the seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import SUPPORT
from watched_worker import WATCH

from training.supervision.watch import is_launcher

WORKER = SUPPORT / "watched_worker.py"
BIN = Path(sys.executable).parent
ALL_GONE_SECONDS = 10.0
LAUNCHERS_END_SECONDS = 45.0  # for `deepspeed` to notice, and to kill after 30 s a rank that does not react
FALSE_SUCCESS_TRIES = 12
START_SECONDS = 90.0


class Run:
    """A run under a launcher of the user's, in a session of its own."""

    def __init__(self, folder: Path, launcher: str, *command: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.num_ranks = 1 if "one rank" in launcher else 2
        self.log = (folder / "log").open("w+")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        ranks = {
            "deepspeed": ["--num_gpus", "2", "--master_port", port],
            "deepspeed, one rank": ["--num_gpus", "1", "--master_port", port],
            "torchrun": ["--nproc-per-node", "2", "--master-port", port],
        }[launcher]
        self.process = subprocess.Popen(
            [str(BIN / launcher.partition(",")[0]), *ranks, *command],
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if all(self._step(rank) >= step for rank in range(self.num_ranks)):
                return
            time.sleep(0.05)
        pytest.fail(f"no step {step}: {self.said()}")

    def _step(self, rank: int) -> int:
        file = self.folder / f"rank{rank}"
        return int((file.read_text() or "0 0").split()[1]) if file.exists() else 0

    def rank(self, rank: int) -> int:
        return int((self.folder / f"rank{rank}").read_text().split()[0])

    def launch_module(self) -> int:
        """The process between the `deepspeed` command and the ranks."""
        return next(pid for pid in self.processes() if b"-m\0deepspeed.launcher.launch" in command_line(pid))

    def ranks(self) -> list[int]:
        return [pid for pid in self.processes() if not is_launcher(pid)]

    def processes(self) -> list[int]:
        """All that is left of the run, of whatever parent: what names its folder on its command line."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [pid for pid in pids if str(self.folder).encode() in command_line(pid)]

    def seconds_until_gone(self, limit_seconds: float, *, launchers_too: bool = True) -> float:
        start = time.monotonic()
        while left := self.processes() if launchers_too else self.ranks():
            if time.monotonic() > start + limit_seconds:
                pytest.fail(f"after {limit_seconds} s there are still {left}\n{self.said()}")
            time.sleep(0.02)
        return time.monotonic() - start

    def said(self) -> str:
        return (self.folder / "log").read_text()[-6000:]

    def clean(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.log.close()


def command_line(pid: int) -> bytes:
    """The command line of a process; empty if it has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    started: list[Run] = []
    yield started
    for run in started:
        run.clean()


def worker_run(runs: list[Run], folder: Path, launcher: str, *settings: str) -> Run:
    runs.append(Run(folder, launcher, str(WORKER), f"run={folder}", *settings))
    return runs[-1]


KILLS = [
    ("deepspeed", "command", signal.SIGKILL),
    ("deepspeed", "command", signal.SIGTERM),
    ("deepspeed", "command", signal.SIGHUP),
    ("deepspeed", "launch.py", signal.SIGKILL),
    ("deepspeed", "launch.py", signal.SIGTERM),
    ("deepspeed", "everybody", signal.SIGINT),
    ("torchrun", "command", signal.SIGKILL),
    ("torchrun", "command", signal.SIGTERM),
]


@pytest.mark.faults
@pytest.mark.parametrize("launcher, victim, number", KILLS, ids=lambda value: str(value).replace(" ", "-"))
def test_when_a_launcher_ends_a_checkpoint_is_made_and_nobody_is_left(
    runs: list[Run], tmp_path: Path, figures: dict[str, str], launcher: str, victim: str, number: signal.Signals
) -> None:
    run = worker_run(runs, tmp_path / "run", launcher)
    run.wait_for_step(10)
    if victim == "everybody":
        os.killpg(run.process.pid, number)  # as a terminal does
    else:
        os.kill(run.process.pid if victim == "command" else run.launch_module(), number)
    seconds = run.seconds_until_gone(ALL_GONE_SECONDS)
    code = run.process.wait()
    figures[f"{number.name} to {launcher} ({victim}): all processes gone"] = f"{seconds:.1f} s, exit code {code}"
    assert code != 0
    committed = {(run.folder / f"committed{rank}").read_text() for rank in range(2)}
    assert len(committed) == 1, run.said()


@pytest.mark.faults
def test_a_signal_to_one_rank_stops_both_with_exit_code_75(runs: list[Run], tmp_path: Path) -> None:
    run = worker_run(runs, tmp_path / "run", "deepspeed")
    run.wait_for_step(10)
    os.kill(run.rank(1), signal.SIGUSR1)
    run.seconds_until_gone(ALL_GONE_SECONDS)
    assert run.process.wait() == 75
    assert "stopped: SIGUSR1 on rank 1; checkpoint" in run.said() and "Traceback" not in run.said()


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_with_one_line(
    runs: list[Run], tmp_path: Path, figures: dict[str, str], rank: int
) -> None:
    run = worker_run(runs, tmp_path / "run", "deepspeed")
    run.wait_for_step(10)
    os.kill(run.rank(rank), signal.SIGKILL)
    seconds = run.seconds_until_gone(ALL_GONE_SECONDS, launchers_too=False)
    code = run.process.wait(timeout=LAUNCHERS_END_SECONDS)
    figures[f"SIGKILL to rank {rank}: both ranks gone"] = f"{seconds:.1f} s, exit code {code}"
    assert code != 0 and "Traceback" not in run.said()


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["stop", "lock", "silent"])
def test_a_rank_that_hangs_ends_the_run_in_time(
    runs: list[Run], tmp_path: Path, figures: dict[str, str], fault: str
) -> None:
    run = worker_run(runs, tmp_path / "run", "deepspeed", f"fault={fault}")
    run.wait_for_step(19)
    limit = WATCH.timeout_seconds + (LAUNCHERS_END_SECONDS if fault == "stop" else 12)
    seconds = run.seconds_until_gone(limit, launchers_too=False)
    code = run.process.wait(timeout=LAUNCHERS_END_SECONDS)
    figures[f"rank 1: {fault}; both ranks gone after a timeout of {WATCH.timeout_seconds:g} s"] = (
        f"{seconds:.1f} s, exit code {code}"
    )
    assert code != 0
    assert fault == "stop" or "in fail" in (run.folder / "stacks-rank1.txt").read_text()
    assert fault != "silent" or "rank 1: no progress for" in run.said()


@pytest.mark.faults
def test_a_killed_launch_module_is_never_a_success(runs: list[Run], tmp_path: Path, figures: dict[str, str]) -> None:
    """The deepspeed command alone would end with 0. Four at once, so that its end and the watch compete for cores."""
    codes = []
    for first in range(0, FALSE_SUCCESS_TRIES, 4):
        batch = [
            worker_run(runs, tmp_path / f"run{number}", "deepspeed, one rank") for number in range(first, first + 4)
        ]
        for run in batch:
            run.wait_for_step(1)
        for run in batch:
            os.kill(run.launch_module(), signal.SIGKILL)
        codes += [run.process.wait(timeout=30) for run in batch]
    failures = sum(code != 0 for code in codes)
    figures["launch.py killed: the deepspeed command reports a failure"] = f"{failures} of {FALSE_SUCCESS_TRIES}"
    assert 0 not in codes, codes
