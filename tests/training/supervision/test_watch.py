"""A rank that beats lives; one that is silent or has lost its launcher ends. Ranks are forked from the test."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from training.engine.distributed import World
from training.supervision import watch
from training.supervision.stopping import Stopping
from training.supervision.watch import (
    EXIT_NO_PROGRESS,
    Heartbeat,
    WatchConfig,
    ancestors,
    find_launchers,
    is_launcher,
    lost_its_launcher,
)

WORLD = World(rank=1, world_size=2)
QUICK = WatchConfig(timeout_seconds=0.3, start_seconds=0.3, orphan_seconds=0.5)
PATIENT = WatchConfig(orphan_seconds=0.3)
SOON = 5.0  # seconds; more than anything here takes


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.7)
    monkeypatch.setattr(watch, "STACKS_SECONDS", 0.5)


def start(folder: Path, config: WatchConfig) -> Heartbeat:
    return Heartbeat.start(config, WORLD, folder, Stopping(folder, WORLD))


def end_of_rank(life: Callable[[], object]) -> tuple[int, float]:
    """Exit code of a forked process that lives `life`, and the seconds it lived."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            life()
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, time.monotonic() - began


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(20)


def waiting_for_data() -> None:
    time.sleep(20)


def test_a_silent_rank_ends_with_its_stacks_on_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def silent() -> None:
        heartbeat = start(tmp_path, QUICK)
        heartbeat.beat("waiting for data of step 12")
        waiting_for_data()

    (tmp_path / "stacks-rank1.txt").write_text("of an earlier start\n")
    code, seconds = end_of_rank(silent)
    assert code == EXIT_NO_PROGRESS == 76 and seconds < SOON
    said = capfd.readouterr().err
    assert re.match(r"rank 1: no progress for \d+ s while: waiting for data of step 12; its stacks are in .*\n$", said)
    stacks = (tmp_path / "stacks-rank1.txt").read_text()
    assert "of an earlier start" in stacks and "in waiting_for_data" in stacks and str(tmp_path) in said


def test_a_rank_whose_interpreter_is_locked_ends_with_its_stacks_on_disk(tmp_path: Path) -> None:
    def locked() -> None:
        heartbeat = start(tmp_path, QUICK)
        heartbeat.beat("step 12")
        hold_the_interpreter()

    code, seconds = end_of_rank(locked)
    assert code == 1 and seconds < SOON
    assert "in hold_the_interpreter" in (tmp_path / "stacks-rank1.txt").read_text()


def test_a_disk_that_takes_no_stacks_keeps_no_rank_alive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stacks-rank1.txt")  # which nobody reads
    reader = os.open(tmp_path / "stacks-rank1.txt", os.O_RDWR)
    os.write(reader, bytes(65536))

    def silent() -> None:
        start(tmp_path, QUICK)
        time.sleep(20)

    assert end_of_rank(silent)[0] == EXIT_NO_PROGRESS
    os.close(reader)


def test_a_rank_that_beats_lives_longer_than_its_timeout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def lively() -> None:
        heartbeat = start(tmp_path, QUICK)
        for step in range(16):
            heartbeat.beat(f"step {step}")
            time.sleep(0.05)
        heartbeat.beat("saving", allow_seconds=10)
        time.sleep(0.8)
        heartbeat.close()
        time.sleep(0.8)  # nobody looks any more
        os._exit(0)

    assert end_of_rank(lively)[0] == 0
    assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_the_first_step_may_take_longer(tmp_path: Path) -> None:
    def slow_start() -> None:
        heartbeat = start(tmp_path, WatchConfig(timeout_seconds=0.2, start_seconds=30))
        heartbeat.beat("step 1")
        time.sleep(1.2)
        heartbeat.end_start()
        heartbeat.beat("step 2")
        time.sleep(20)

    code, seconds = end_of_rank(slow_start)
    assert code == EXIT_NO_PROGRESS and 1.3 < seconds < SOON


def test_a_heartbeat_that_was_closed_or_never_started_leaves_nothing_behind(tmp_path: Path) -> None:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    Heartbeat(WatchConfig()).beat("step 1")
    heartbeat = start(tmp_path / "runs" / "first", WatchConfig())
    assert threading.active_count() == len(threads) + 1
    heartbeat.close()
    heartbeat.close()
    heartbeat.beat("after the end")
    assert set(threading.enumerate()) == threads and set(os.listdir("/proc/self/fd")) == descriptors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_times_are_positive_and_the_first_step_has_no_less_than_the_others(value: float) -> None:
    for name in ("timeout_seconds", "start_seconds", "orphan_seconds"):
        with pytest.raises(ValueError, match=f"watch.{name} is {value}"):
            WatchConfig(**{name: value})
    with pytest.raises(ValueError, match="watch.start_seconds is 10.*watch.timeout_seconds, 20"):
        WatchConfig(timeout_seconds=20, start_seconds=10)


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that are taken for the launchers above: launch.py, and the `deepspeed` command above it."""
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    monkeypatch.setattr(watch, "find_launchers", lambda pid: [os.pidfd_open(process.pid) for process in processes])
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def orphan(folder: Path, killed: subprocess.Popen[bytes], *, stops: bool, asked: bool = False) -> None:
    """A rank one of whose launchers is killed; it ends with 75 if it is asked to stop and does."""
    stopping = Stopping(folder, World())
    if asked:
        stopping.ask(signal.SIGINT)
    Heartbeat.start(PATIENT, World(), folder, stopping)
    os.kill(killed.pid, signal.SIGKILL)
    end = time.monotonic() + 2.5
    while time.monotonic() < end and (asked or not stops or not stopping.agreed()):
        time.sleep(0.02)
    os._exit(75 if stops else 0)


def test_a_killed_launcher_is_no_success_and_its_rank_stops(
    tmp_path: Path, launchers: list[subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    code, seconds = end_of_rank(lambda: orphan(tmp_path, launchers[0], stops=True))
    assert code == 75 and seconds < 2.5
    assert launchers[1].wait(SOON) == -signal.SIGTERM  # or the `deepspeed` command would end with 0
    assert capfd.readouterr().err.startswith("rank 0: its launcher is gone: training stops")


@pytest.mark.parametrize("above", [0, 1])
def test_an_orphan_that_does_not_stop_is_ended_in_time(
    tmp_path: Path, launchers: list[subprocess.Popen[bytes]], above: int
) -> None:
    code, seconds = end_of_rank(lambda: orphan(tmp_path, launchers[above], stops=False))
    assert code == EXIT_NO_PROGRESS and PATIENT.orphan_seconds < seconds < 2.5


def test_a_rank_that_stops_already_is_left_to_the_launcher_that_waits_for_it(
    tmp_path: Path, launchers: list[subprocess.Popen[bytes]]
) -> None:
    """As after Ctrl-C: the `deepspeed` command leaves at once, its launch.py waits for the last checkpoint."""
    assert end_of_rank(lambda: orphan(tmp_path, launchers[1], stops=False, asked=True))[0] == 0
    assert launchers[0].poll() is None


@pytest.mark.parametrize(
    ("environment", "code"),
    [({"CROSS_RANK": "0"}, 76), ({"TORCHELASTIC_RUN_ID": "none"}, 76), ({"RANK": "0", "SLURM_PROCID": "0"}, 0)],
)
def test_a_launched_rank_whose_launcher_died_before_it_was_watched_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], code: int
) -> None:
    """Nobody else is an orphan, whatever its parent is."""
    for name in ("CROSS_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)

    def late() -> None:
        os.environ |= environment
        watch.lost_its_launcher = lambda pid: True
        start(tmp_path, PATIENT)
        time.sleep(20 if code else 0.8)
        os._exit(0)

    assert end_of_rank(late)[0] == code


@pytest.mark.parametrize(
    "command, is_one",
    [
        ("/v/bin/python /v/bin/deepspeed --num_gpus 2 train.py", True),
        ("/v/bin/python -u -m deepspeed.launcher.launch --world_info=x train.py", True),
        ("/v/bin/python /v/bin/torchrun --nproc-per-node 2 train.py", True),
        ("python3 -m torch.distributed.run train.py", True),
        ("python launchers/demo.py deepspeed", False),
        ("bash -c deepspeed_train.sh", False),
        ("nohup python train.py", False),
    ],
)
def test_launchers_are_known_by_their_command_line(monkeypatch: pytest.MonkeyPatch, command: str, is_one: bool) -> None:
    monkeypatch.setattr(Path, "read_bytes", lambda path: "\0".join(command.split(" ")).encode() + b"\0")
    assert is_launcher(1) == is_one


def test_launchers_are_found_among_the_ancestors(tmp_path: Path) -> None:
    assert ancestors(os.getpid())[0] == os.getppid() and ancestors(2**22 + 1) == []
    assert find_launchers(os.getpid()) == [] and not is_launcher(2**22 + 1)
    (tmp_path / "deepspeed").write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'input()'])\n")
    command = subprocess.Popen([sys.executable, str(tmp_path / "deepspeed")], stdin=subprocess.PIPE)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    while not (child := children.read_text().split()):
        time.sleep(0.02)
    [handle] = find_launchers(int(child[0]))
    signal.pidfd_send_signal(handle, 0)
    os.close(handle)
    assert not lost_its_launcher(int(child[0]))
    command.communicate(b"\n")
    assert lost_its_launcher(1)
