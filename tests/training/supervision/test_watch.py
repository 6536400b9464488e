"""A rank that beats lives; one that falls silent ends, and says what it was doing. Ranks are forked from the test."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from training.engine.distributed import World
from training.supervision.watch import EXIT_NO_PROGRESS, Heartbeat, Reports, WatchConfig, was_launched
from training.supervision.watcher import Beat, read_stat

WORLD = World(rank=1, world_size=2)
QUICK = WatchConfig(timeout_seconds=0.7, start_seconds=0.7)


def end_of_rank(life: Callable[[], None]) -> tuple[int, float]:
    """Exit code of a forked process that lives `life`, and the seconds it lived."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            life()
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, time.monotonic() - start


def waiting_for_data() -> None:
    time.sleep(20)


def test_a_silent_rank_ends_with_its_stacks_on_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def silent() -> None:
        heartbeat = Heartbeat.start(QUICK, WORLD, tmp_path)
        heartbeat.beat("waiting for data of step 12")
        waiting_for_data()

    code, seconds = end_of_rank(silent)
    assert code == EXIT_NO_PROGRESS == 76 and seconds < 3.5
    said = capfd.readouterr().err
    assert re.search(r"^rank 1: no progress for \d+ s while: waiting for data of step 12$", said, re.MULTILINE)
    assert str(tmp_path / "stacks-rank1.txt") in said
    assert "waiting_for_data" in (tmp_path / "stacks-rank1.txt").read_text()


def test_a_rank_that_beats_lives_longer_than_its_timeout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def lively() -> None:
        heartbeat = Heartbeat.start(QUICK, WORLD, tmp_path)
        for step in range(20):
            heartbeat.beat(f"step {step}")
            time.sleep(0.1)
        heartbeat.beat("saving", allow_seconds=5)
        time.sleep(1.2)
        heartbeat.close()
        os._exit(0)

    assert end_of_rank(lively)[0] == 0
    assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_the_first_step_may_take_longer(tmp_path: Path) -> None:
    def slow_start() -> None:
        heartbeat = Heartbeat.start(WatchConfig(timeout_seconds=0.3, start_seconds=30), WORLD, tmp_path)
        heartbeat.beat("step 1")
        time.sleep(1.2)
        heartbeat.end_start()
        heartbeat.beat("step 2")
        time.sleep(20)

    code, seconds = end_of_rank(slow_start)
    assert code == EXIT_NO_PROGRESS and 1.5 < seconds < 4


def test_time_in_which_a_rank_was_stopped_does_not_count(tmp_path: Path) -> None:
    """As when a scheduler suspends a job: its thread finds the deadline long past, and lets the rank go on."""

    def suspended() -> None:
        heartbeat = Heartbeat.start(WatchConfig(timeout_seconds=1.5, start_seconds=1.5), WORLD, tmp_path)
        watcher = heartbeat._watch._process.pid
        for _ in range(20):  # until the watcher is at its work
            time.sleep(0.1)
            heartbeat.beat("working")
        alarm = os.fork()
        if alarm == 0:
            time.sleep(4)
            for pid in (watcher, os.getppid()):
                os.kill(pid, signal.SIGCONT)
            os._exit(0)
        os.kill(watcher, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.8)
        heartbeat.close()
        os._exit(0)

    code, seconds = end_of_rank(suspended)
    assert code == 0 and seconds > 4


def test_closing_leaves_nothing_behind(tmp_path: Path) -> None:
    threads, descriptors = set(threading.enumerate()), set(os.listdir("/proc/self/fd"))
    wakeup = signal.set_wakeup_fd(-1)
    heartbeat = Heartbeat.start(WatchConfig(), World(), tmp_path / "run")
    watcher = heartbeat._watch._process.pid
    assert read_stat(watcher)[0] in ("R", "S", "D")
    heartbeat.close()
    heartbeat.close()
    heartbeat.beat("after the end")
    assert read_stat(watcher) == ("", 0)
    del heartbeat
    assert set(threading.enumerate()) == threads and set(os.listdir("/proc/self/fd")) == descriptors
    assert signal.set_wakeup_fd(wakeup) == -1


def test_nobody_watches_a_heartbeat_that_was_not_started() -> None:
    threads = set(threading.enumerate())
    heartbeat = Heartbeat(WatchConfig())
    heartbeat.beat("step 1")
    assert heartbeat._board.read().doing == "step 1" and set(threading.enumerate()) == threads
    heartbeat.close()


@pytest.mark.parametrize("name", ["timeout_seconds", "start_seconds", "orphan_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_times_are_positive(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"watch.{name} is {value}"):
        WatchConfig(**{name: value})


def test_the_first_step_is_not_given_less_than_the_others() -> None:
    with pytest.raises(ValueError, match="watch.start_seconds is 10.*watch.timeout_seconds, 20"):
        WatchConfig(timeout_seconds=20, start_seconds=10)


def reports_of(folder: Path, rank: int) -> Reports:
    return Reports(folder, World(rank=rank, world_size=3), timeout_seconds=600)


def test_the_rank_that_has_not_moved_for_longest_is_named(tmp_path: Path) -> None:
    now = time.monotonic()
    ours = Beat("step 12: forward", now - 20, now)
    assert reports_of(tmp_path, 0).behind(ours) == ""
    reports_of(tmp_path, 1).write(Beat("step 11: backward", now - 25, now))
    reports_of(tmp_path, 2).write(Beat("step 12: forward", now - 19, now))
    assert reports_of(tmp_path, 0).behind(ours) == "rank 1 was last seen 25 s ago: step 11: backward"
    assert reports_of(tmp_path, 1).behind(Beat("step 11: backward", now - 25, now)) == ""
    (tmp_path / "rank-1.json").write_text("{")
    assert reports_of(tmp_path, 0).behind(ours) == ""


def test_reports_are_few_in_a_large_world_and_gone_in_the_end(tmp_path: Path) -> None:
    assert reports_of(tmp_path, 0).every_seconds == 10
    assert Reports(tmp_path, World(world_size=800), timeout_seconds=600).every_seconds == 100
    for rank in range(2):
        reports_of(tmp_path / "run", rank).write(Beat("x", time.monotonic(), 0))
    assert json.loads((tmp_path / "run" / "rank-1.json").read_text())["doing"] == "x"
    for rank in range(2):
        reports_of(tmp_path / "run", rank).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_used", [False, True])
def test_a_run_that_came_to_nothing_leaves_no_folder_behind(tmp_path: Path, is_used: bool) -> None:
    run = tmp_path / "runs" / "first"
    reports = Reports(run / "heartbeats", World(), timeout_seconds=600)
    reports.write(Beat("starting", time.monotonic(), time.monotonic() + 9))
    if is_used:
        (run / "config.yaml").touch()
    reports.remove()
    assert list(tmp_path.rglob("*")) == ([tmp_path / "runs", run, run / "config.yaml"] if is_used else [])


def test_a_disk_that_takes_no_report_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reports_of(tmp_path / "file", 0).write(Beat("x", time.monotonic(), 0))


def test_launchers_are_known_by_what_they_set() -> None:
    assert was_launched({"CROSS_RANK": "0"}) and was_launched({"TORCHELASTIC_RUN_ID": "none"})
    assert not was_launched({"RANK": "0", "SLURM_PROCID": "0"})
