"""Training's side: news cost nothing, the uploader ends with the trainer, and never holds it longer than it may."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT
from trackers import points_of, record_of, train_record, validation_record

from training.tracking.mlflow_state import read_state
from training.tracking.mlflow_view import MLflowView
from training.tracking.record import TrackingConfig

WAIT_SECONDS = 60.0  # for a process that imports mlflow on a busy machine
TRAINER = """
import sys, time
from pathlib import Path
from training.tracking.mlflow_view import MLflowView
from training.tracking.record import TrackingConfig
view = MLflowView(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2]), {})
view.notify()
print(view._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def silent_tracker() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def wait_until(is_so: object, seconds: float = WAIT_SECONDS) -> None:
    limit = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.05)


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process_id}/stat").read_text().rsplit(")")[1].split()[0] != "Z"


def test_a_run_and_its_resumption_are_one_mlflow_run_whatever_signals_are_sent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits" / "d2"
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test")
    record = record_of(folder, *[train_record(step) for step in range(1, 31)], validation_record(30))
    first = MLflowView(folder, config, {"model.depth": 2})
    assert first.run_id is None
    first.notify()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # before it can have set anything up
        os.kill(first._process.pid, number)
    assert os.getpgid(first._process.pid) != os.getpgid(0)
    first.close("KILLED", patience_seconds=WAIT_SECONDS)
    run_id = first.run_id
    record.forget_after(25)
    second = MLflowView(folder, config, {"model.depth": 2})
    second.notify()
    record.write([train_record(step, time=5000.0) for step in range(26, 31)] + [validation_record(30)])
    record.write([train_record(step) for step in range(31, 41)])
    second.close()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.uri)
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "digits/d2", "FINISHED")
    expected = points_of(record.read())
    for name in {name for name, _ in expected}:
        found = [(name, point.step) for point in client.get_metric_history(run_id, name)]
        assert sorted(found) == sorted(key for key in expected if key[0] == name)
    assert capfd.readouterr() == ("", "")


def test_news_cost_microseconds_also_while_the_tracker_is_dead(tmp_path: Path, silent_tracker: str) -> None:
    record_of(tmp_path, train_record(1))
    view = MLflowView(tmp_path, TrackingConfig(uri=silent_tracker), {})
    view.notify()
    seconds = []
    for _ in range(1000):
        start = time.perf_counter()
        view.notify()
        seconds.append(time.perf_counter() - start)
    view.close("FAILED", patience_seconds=0.1)
    assert statistics.median(seconds) < 200e-6


@pytest.mark.parametrize("status, patience", [("FAILED", 0.2), ("FINISHED", 6.0)])
def test_closing_gives_up_on_a_tracker_that_hangs_and_names_the_command(
    tmp_path: Path, silent_tracker: str, status: str, patience: float, capfd: pytest.CaptureFixture[str]
) -> None:
    record_of(tmp_path, train_record(1))
    view = MLflowView(tmp_path, TrackingConfig(uri=silent_tracker), {})
    view.notify()
    started = time.monotonic()
    view.close(status, patience_seconds=patience)
    assert time.monotonic() - started < patience + 1.0  # a busy machine
    assert not is_alive(view._process.pid)
    lines = [line for line in capfd.readouterr().out.splitlines() if "sends what is missing" in line]
    assert len(lines) == 1 and f"`python launchers/sync_mlflow.py {tmp_path}`" in lines[0]


def test_the_uploader_ends_when_the_trainer_is_killed(tmp_path: Path, silent_tracker: str) -> None:
    record_of(tmp_path, train_record(1))
    command = [sys.executable, "-c", TRAINER, str(tmp_path), silent_tracker]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    uploader = int(trainer.stdout.readline())
    assert is_alive(uploader)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_until(lambda: not is_alive(uploader), seconds=10)


def test_an_uploader_that_was_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.tracking.mlflow_view.RESTART_SECONDS", 0.0)
    record = record_of(tmp_path, train_record(1))
    view = MLflowView(tmp_path, TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), {})
    view.notify()
    wait_until(lambda: view.run_id)
    view._process.kill()
    view._process.wait()
    record.write([train_record(2)])
    view.notify()
    view.close()
    assert "ended with code -9; it is started again" in capfd.readouterr().out
    assert read_state(tmp_path)["status"] == "FINISHED"


def test_a_view_without_news_has_nothing_to_close(tmp_path: Path) -> None:
    view = MLflowView(tmp_path, TrackingConfig(uri="http://127.0.0.1:9"), {})
    view.close()
    assert list(tmp_path.iterdir()) == []
