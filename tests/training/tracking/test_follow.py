"""A page follows its run through outages to its end; the trainer neither waits for that process nor outlives it."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repository import ROOT
from trackers import FakeMLflow, connect, page_of, points_of, record_of, sender_of, train_record, validation_record

from training.tracking.follow import PATIENCE_SECONDS, LivePage, follow, send
from training.tracking.mlflow import TrackerUnavailable, read_state
from training.tracking.record import TrackingConfig

WAIT_SECONDS = 60.0  # for a process that imports mlflow on a busy machine
TRAINER = """
import sys, time
from pathlib import Path
from training.tracking.follow import LivePage
from training.tracking.record import TrackingConfig
page = LivePage(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2]), {})
page.notify()
print(*{"mlflow", "torch"} & set(sys.modules), flush=True)
time.sleep(600)
"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    return connect(FakeMLflow(), monkeypatch)


class Run:
    """A run that does the next thing each time its follower waits, and has ended when there is none."""

    def __init__(self, ending: str, *events: Callable[[], object]) -> None:
        self.ending = ending
        self.events = list(events)
        self.said: list[str] = []
        self.pauses: list[float] = []

    def wait(self, seconds: float) -> str:
        self.pauses.append(seconds)
        if not self.events:
            return self.ending
        self.events.pop(0)()
        return "RUNNING"


def nothing() -> None:
    """Let time pass."""


def test_an_outage_costs_two_lines_and_no_point(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, train_record(1))

    def go() -> None:
        client.fail = lambda call: "refused"
        record.write([train_record(step) for step in range(2, 100)])

    def come_back() -> None:
        client.fail = lambda call: ""

    run = Run("FINISHED", nothing, go, *[nothing] * 5, come_back)
    follow(page_of(tmp_path), run.wait, run.said.append)
    away, back = run.said
    assert "ConnectionError: connection refused; metrics.jsonl goes on" in away
    assert f"{len(points_of(record.read())) - 4} points sent" in back
    assert run.pauses == [0, 1, 1, 2, 4, 8, 16, 30, 1]  # seconds
    assert client.history() == points_of(record.read()) and client.active()[0].info.status == "FINISHED"


def test_what_is_written_last_is_sent_before_the_end(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path)
    run = Run("KILLED", nothing, lambda: record.write([train_record(1)]))
    follow(page_of(tmp_path), run.wait, run.said.append)
    assert client.history() == points_of(record.read())
    assert client.active()[0].info.status == "KILLED" and run.said == []


def test_a_tracker_that_is_down_at_the_end_is_asked_three_times(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, train_record(1))
    client.fail = lambda call: "refused"
    run = Run("FAILED", *[nothing] * 6)
    with pytest.raises(TrackerUnavailable, match="^http://tracker:5000: ConnectionError: connection refused; send it"):
        follow(page_of(tmp_path), run.wait, run.said.append)
    assert run.pauses[-3:] == [30, 1, 2] and len(run.said) == 1


def test_a_run_that_has_ended_is_sent_once_and_one_that_another_process_sends_is_left_to_it(
    tmp_path: Path, client: FakeMLflow
) -> None:
    record = record_of(tmp_path, train_record(1))
    assert [send(page_of(tmp_path), "FINISHED") for _ in range(2)] == [len(points_of(record.read())), 0]
    other = page_of(tmp_path)
    other.claim()
    calls = len(client.calls)
    with pytest.raises(BlockingIOError):
        send(page_of(tmp_path), "FINISHED")
    assert len(client.calls) == calls


@pytest.fixture
def silent_tracker() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def wait_until(is_so: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit
        time.sleep(0.02)


def started(folder: Path) -> int:
    """The process that sends a run, which between fork and exec is a copy of its parent."""
    wait_until(lambda: sender_of(folder) is not None)
    return sender_of(folder) or 0


def test_a_run_killed_processes_and_a_resumption_are_one_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Signals to stop pass the process by, a killed one is started again, and a resumed run goes on in its page."""
    monkeypatch.setattr("training.tracking.follow.RESTART_SECONDS", 0.0)
    monkeypatch.setitem(PATIENCE_SECONDS, "KILLED", WAIT_SECONDS)  # a busy machine
    folder = tmp_path / "digits" / "d2"
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test")
    record = record_of(folder, *map(train_record, range(1, 31)), validation_record(30))
    first = LivePage(folder, config, {"model.depth": 2})
    assert first.run_id is None
    first.notify()
    process = started(folder)
    assert os.getsid(process) == process
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # before it can have set anything up
        os.kill(process, number)
    wait_until(lambda: first.run_id)
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    record.write([train_record(31)])
    first.notify()
    first.close("KILLED")
    assert read_state(folder)["status"] == "KILLED"
    record.forget_after(25)
    second = LivePage(folder, config, {"model.depth": 2})
    second.notify()
    record.write([train_record(step, time=5000.0) for step in range(26, 32)] + [validation_record(30)])
    record.write([train_record(step) for step in range(32, 41)])
    second.close("FINISHED")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.uri)
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (first.run_id, "digits/d2", "FINISHED")
    expected = points_of(record.read())
    for name in {name for name, _ in expected}:
        found = [(name, point.step) for point in client.get_metric_history(run.info.run_id, name)]
        assert sorted(found) == sorted(key for key in expected if key[0] == name)
    said = capfd.readouterr()
    assert said.err == "" and said.out == "mlflow: the process that sends ended with code -9; it is started again\n"


def test_news_cost_microseconds_and_closing_gives_up_on_a_tracker_that_hangs(
    tmp_path: Path, silent_tracker: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PATIENCE_SECONDS, "FAILED", 0.2)
    record_of(tmp_path, train_record(1))
    page = LivePage(tmp_path, TrackingConfig(uri=silent_tracker), {})
    page.close("FINISHED")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]  # without news there is nothing to close
    page.notify()
    seconds = []
    for _ in range(1000):
        start = time.perf_counter()
        page.notify()
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 200e-6
    started = time.monotonic()
    page.close("FAILED")
    assert time.monotonic() - started < 4  # of a busy machine; the tracker never answers
    assert sender_of(tmp_path) is None
    [line] = capfd.readouterr().out.splitlines()
    assert (
        f"{silent_tracker} did not answer in time" in line
        and f"sync_mlflow.py {tmp_path} --uri {silent_tracker}`" in line
    )
    assert read_state(tmp_path)["status"] == "FAILED"  # for the command to tell MLflow


@pytest.mark.parametrize("delay", [0.0, pytest.param(2.0, marks=pytest.mark.faults)])
def test_the_process_dies_with_a_trainer_that_is_killed(tmp_path: Path, silent_tracker: str, delay: float) -> None:
    record_of(tmp_path, train_record(1))
    command = [sys.executable, "-c", TRAINER, str(tmp_path), silent_tracker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "\n"  # a trainer imports neither for its tracker
        started(tmp_path)
        time.sleep(delay)
        assert sender_of(tmp_path) is not None
        trainer.kill()
    wait_until(lambda: sender_of(tmp_path) is None, seconds=10)
