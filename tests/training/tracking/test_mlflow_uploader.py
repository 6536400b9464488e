"""The uploader tries again, says when a tracker goes and comes back, and ends when the run has ended."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from trackers import FakeMLflow, points_of, record_of, tracker_of, train_record

from training.tracking import mlflow_uploader
from training.tracking.mlflow_state import read_state
from training.tracking.mlflow_tracker import Tracker, TrackerUnavailable
from training.tracking.mlflow_uploader import (
    ALL_SENT,
    NOT_ALL_SENT,
    START_OVER,
    Follower,
    Uploader,
    pause_after,
    send_now,
)

WAIT_SECONDS = 20.0  # for a thread on a busy machine


@pytest.fixture
def client() -> FakeMLflow:
    return FakeMLflow()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_uploader, "pause_after", lambda failures: 0.001)
    monkeypatch.setattr(mlflow_uploader, "POLL_SECONDS", 0.001)


class Following:
    """A follower at work in a thread, and what it has said."""

    def __init__(self, tracker: Tracker) -> None:
        self.said: list[str] = []
        self.heard = threading.Event()
        self.follower = Follower(tracker, self._hear)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _hear(self, line: str) -> None:
        self.said.append(line)
        self.heard.set()

    def _follow(self) -> None:
        self.code = self.follower.follow()

    def wait_until_it_speaks(self) -> None:
        assert self.heard.wait(WAIT_SECONDS)
        self.heard.clear()

    def end(self, status: str) -> None:
        self.follower.end(status)
        self._thread.join(WAIT_SECONDS)


def test_an_outage_costs_two_lines_and_no_point(tmp_path: Path, client: FakeMLflow, no_pauses: None) -> None:
    record = record_of(tmp_path, train_record(1))
    client.fail = lambda call: "refused"
    following = Following(tracker_of(tmp_path, client))
    following.wait_until_it_speaks()
    record.write([train_record(step) for step in range(2, 100)])
    limit = time.monotonic() + WAIT_SECONDS
    while len(client.calls) < 20 and time.monotonic() < limit:  # many attempts, one line
        time.sleep(0.01)
    assert len(following.said) == 1
    client.fail = lambda call: ""
    following.wait_until_it_speaks()
    following.end("FINISHED")
    away, back = following.said
    assert "ConnectionError: connection refused; metrics.jsonl goes on" in away
    assert f"{len(points_of(record.read()))} points sent" in back
    assert following.code == ALL_SENT
    assert client.history() == points_of(record.read())
    assert client.active()[0].info.status == read_state(tmp_path)["status"] == "FINISHED"


def test_a_run_that_goes_on_is_shown_as_running(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, train_record(1))
    stopped = tracker_of(tmp_path, client)
    Uploader(stopped).catch_up("KILLED")
    stopped.state.release()
    assert client.active()[0].info.status == "KILLED"
    Uploader(tracker_of(tmp_path, client)).catch_up("RUNNING")
    assert client.active()[0].info.status == "RUNNING"


def test_a_tracker_that_is_down_at_the_end_is_asked_three_times(
    tmp_path: Path, client: FakeMLflow, no_pauses: None
) -> None:
    record_of(tmp_path, train_record(1))
    client.fail = lambda call: "refused"
    following = Following(tracker_of(tmp_path, client))
    following.wait_until_it_speaks()
    following.end("FAILED")
    assert following.code == NOT_ALL_SENT
    assert f"the curves of {tmp_path}" in following.said[-1]
    assert f"`python launchers/sync_mlflow.py {tmp_path}`" in following.said[-1]
    assert read_state(tmp_path)["status"] == "FAILED"  # for the command to tell MLflow


def test_what_is_left_is_counted_once_the_tracker_was_there(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, train_record(1))
    said: list[str] = []
    follower = Follower(tracker_of(tmp_path, client), said.append)
    follower.uploader.catch_up("RUNNING")
    record.write([train_record(2), train_record(3)])
    follower.say_what_is_left()
    assert "mlflow: 8 points of" in said[0]


def test_pauses_grow_and_stay_bounded() -> None:
    assert [pause_after(failures) for failures in (1, 2, 3, 6, 7, 5000)] == [1, 2, 4, 30, 30, 30]


def test_a_run_started_over_has_a_fresh_mlflow_run_that_names_the_old_one(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, *[train_record(step) for step in range(1, 31)])
    uploader = Uploader(tracker_of(tmp_path, client))
    uploader.catch_up("RUNNING")
    [old] = client.active()
    record.forget_after(20)
    record.write([train_record(step, loss_avg=7.0) for step in range(21, 41)])
    (tmp_path / START_OVER).touch()
    uploader.catch_up("RUNNING")
    [new] = client.active()
    assert client.history() == points_of(record.read())
    assert new.info.run_name == old.info.run_name and new.data.tags["nextscale.replaces"] == old.info.run_id
    assert not (tmp_path / START_OVER).exists()


@pytest.mark.parametrize("fault", ["refused", "lost"])
def test_a_start_over_that_fails_anywhere_is_done_by_the_next_attempt(tmp_path: Path, fault: str) -> None:
    for number in range(12):
        client, folder = FakeMLflow(), tmp_path / str(number)
        record = record_of(folder, *[train_record(step) for step in range(1, 4)])
        uploader = Uploader(tracker_of(folder, client))
        uploader.catch_up("RUNNING")
        record.write([train_record(4)])
        (folder / START_OVER).touch()
        failing = len(client.calls) + number
        client.fail = lambda call: fault if call == failing else ""
        for _ in range(2):
            try:
                uploader.catch_up("RUNNING")
            except ConnectionError:
                continue
        assert client.history() == points_of(record.read()), number
        assert len(client.runs) == 2 and client.active()[0].data.tags["nextscale.replaces"] == f"{1:032x}"


def test_a_start_over_without_a_run_makes_one(tmp_path: Path, client: FakeMLflow) -> None:
    record = record_of(tmp_path, train_record(1))
    (tmp_path / START_OVER).touch()
    Uploader(tracker_of(tmp_path, client)).catch_up("RUNNING")
    assert client.history() == points_of(record.read())


def test_sending_now_gives_up_after_three_attempts(tmp_path: Path, client: FakeMLflow, no_pauses: None) -> None:
    record_of(tmp_path, train_record(1))
    client.fail = lambda call: "refused"
    with pytest.raises(TrackerUnavailable, match="http://tracker:5000: ConnectionError: connection refused"):
        send_now(tracker_of(tmp_path, client), "FINISHED")
    assert len(client.calls) == 3


def test_a_run_that_another_process_sends_is_left_to_it(tmp_path: Path, client: FakeMLflow) -> None:
    record_of(tmp_path, train_record(1))
    first = tracker_of(tmp_path, client)
    first.connect()
    calls = len(client.calls)
    with pytest.raises(BlockingIOError):
        send_now(tracker_of(tmp_path, client), "FINISHED")
    assert len(client.calls) == calls
