"""What brings MLflow up to metrics.jsonl: a process beside rank 0, or for once by launchers/sync_mlflow.py.

metrics.jsonl is the queue, read in slices, so that neither an outage nor a long record costs memory. A process, because
a thread takes the interpreter's lock from training: while one imported mlflow, single steps took eight times as long.
It leaves the signals that stop a run to the trainer, and ends when the trainer does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.files.signals import STOP_SIGNALS
from training.tracking.mlflow_client import code_version, reason
from training.tracking.mlflow_tracker import Sent, Tracker, TrackerUnavailable
from training.tracking.record import Place, Record, TrackingConfig
from training.tracking.redaction import redacted_output

START_OVER = "mlflow.start_over"  # a file of the run folder: its MLflow run is to be replaced
SLICE = 50  # records read at a time
POLL_SECONDS = 1.0  # between looks at metrics.jsonl
MAX_PAUSE_SECONDS = 30.0  # between attempts; the first pause is 1 s, each next one twice as long
LAST_ATTEMPTS = 3  # once training is over, a tracker that is down is not worth a long wait
NICENESS = 10  # training goes first
ALL_SENT, NOT_ALL_SENT, ORPHANED = 0, 1, 2  # exit codes
QUIET_AND_QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # attempts are repeated here
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
ENDED = ("FINISHED", "FAILED", "KILLED")


class Uploader:
    """Brings a tracker up to the record, as often as it is asked to; an attempt goes on where the last one failed."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.sent = Sent()
        self.place = Place()  # in the record: the tracker has all that lies before
        self._is_connected = False

    def catch_up(self, status: str) -> None:
        """Send what is missing and set the run's status. Raises whatever MLflow raises."""
        try:
            self._replace_run_if_asked()
            self._send_missing()
            if self.tracker.run_id:
                self.tracker.set_status(status)
        except Exception:
            self._is_connected = False  # whether the last call arrived, the tracker must tell
            raise

    def _replace_run_if_asked(self) -> None:
        request = self.tracker.folder / START_OVER
        if request.exists():
            self.tracker.start_over()
            request.unlink()
            self._is_connected = False

    def _send_missing(self) -> None:
        while news := list(islice(self.tracker.record.read_after(self.place), SLICE)):
            if self._is_connected:
                self.sent += self.tracker.send([record for record, _ in news])
                self.place = news[-1][1]
            else:
                self._connect()

    def _connect(self) -> None:
        """Connect, and go back to the record's start if the tracker has less than what it was sent."""
        run_id, marks = self.tracker.run_id, self.tracker.marks
        self.tracker.connect()
        self._is_connected = True
        if self.tracker.run_id != run_id or any(self.tracker.marks.get(kind, -1) < marks[kind] for kind in marks):
            self.place = Place()


def send_now(tracker: Tracker, status: str) -> Sent:
    """Bring a tracker up to the record of a run that ended with `status`.

    Raises:
        BlockingIOError: another process is sending this run.
        TrackerUnavailable: the tracker cannot be reached, or does not take it.
    """
    uploader = Uploader(tracker)
    for failures in range(1, LAST_ATTEMPTS + 1):
        try:
            uploader.catch_up(status)
            return uploader.sent
        except BlockingIOError:
            raise
        except Exception as error:  # whatever a tracker throws
            last = error
        if failures < LAST_ATTEMPTS:
            time.sleep(pause_after(failures))
    raise TrackerUnavailable(f"{tracker.uri}: {reason(last)}; do this again when it is back")


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(MAX_PAUSE_SECONDS, 2.0 ** min(failures - 1, 10))


class Follower:
    """Follows a record until the run ends; says when the tracker goes away, and when it is back."""

    def __init__(self, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.uploader = Uploader(tracker)
        self.say = say
        self.status = "RUNNING"
        self._wake = threading.Event()
        self._failures = 0  # in a row
        self._failing_since = 0.0
        self._sent_before = Sent()  # the failures
        self._last_reason = "there was no time"
        self._left = threading.Lock()  # held by the thread that has said what is left

    def follow(self) -> int:
        """Send what is new until `end` is called; the exit code, with what was not sent said in one line."""
        last_failures = 0
        while last_failures < LAST_ATTEMPTS:
            status = self.status  # before reading: what was written by then will be sent
            has_sent = self._try(status)
            if has_sent and status != "RUNNING":
                return ALL_SENT
            last_failures += status != "RUNNING"
            self._wake.wait(POLL_SECONDS if has_sent else pause_after(last_failures or self._failures))
            self._wake.clear()
        self.say_what_is_left()
        return NOT_ALL_SENT

    def end(self, status: str) -> None:
        """The run has ended so: send what is left, and leave."""
        with suppress(OSError):  # a full disk: MLflow is told all the same
            self.uploader.tracker.note(status=status)
        self.status = status
        self._wake.set()

    def say_what_is_left(self) -> None:
        """Name the command that sends what was not sent; said once, and whoever comes second waits for the end."""
        self._left.acquire()
        tracker = self.uploader.tracker
        number = f"{tracker.count_missing(self.uploader.place)} points" if tracker.run_id else "the curves"
        self.say(
            f"mlflow: {number} of {tracker.folder} did not reach {tracker.uri} ({self._last_reason}); "
            f"`python launchers/sync_mlflow.py {tracker.folder}` sends what is missing"
        )

    def _try(self, status: str) -> bool:
        sent = self.uploader.sent
        try:
            self.uploader.catch_up(status)
        except Exception as error:  # whatever a tracker throws must not reach training: the record is complete
            self._note_failure(reason(error), sent)
            return False
        if self._failures:
            number = self.uploader.sent.new - self._sent_before.new
            self.say(f"mlflow: back after {time.monotonic() - self._failing_since:.0f} s; {number} points sent")
        self._failures = 0
        return True

    def _note_failure(self, why: str, sent: Sent) -> None:
        if not self._failures:
            self._failing_since, self._sent_before = time.monotonic(), sent
            self.say(f"mlflow: {why}; metrics.jsonl goes on, and is sent when the tracker is back")
        self._failures += 1
        self._last_reason = why


def main() -> None:
    """Serve the trainer that started this process: its orders are lines of JSON on the standard input."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    for name, value in QUIET_AND_QUICK.items():
        os.environ.setdefault(name, value)
    with redacted_output():
        _serve(json.loads(sys.stdin.readline()))


def _serve(order: dict[str, Any]) -> NoReturn:
    threading.Thread(target=_end_with, args=(order["trainer"],), daemon=True).start()
    tracker = Tracker(Path(order["folder"]), TrackingConfig(**order["config"]), order["parameters"])
    follower = Follower(tracker, _say)
    with suppress(OSError):
        tracker.note(status=follower.status, git=code_version())
    threading.Thread(target=_listen, args=(follower,), daemon=True).start()
    _leave(follower.follow())


def _end_with(trainer: int) -> None:
    """A trainer that is killed says nothing, and its forks may hold the pipe open."""
    while os.getppid() == trainer:
        time.sleep(0.5)
    _leave(ORPHANED)


def _listen(follower: Follower) -> None:
    """Wait for the order to end, then for the patience that comes with it."""
    line = sys.stdin.readline()
    if not line:
        _leave(ORPHANED)
    order: dict[str, Any] = json.loads(line)
    follower.end(order["status"])
    time.sleep(order["patience_seconds"])
    follower.say_what_is_left()
    _leave(NOT_ALL_SENT)


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        print(line, flush=True)


def _leave(code: int) -> NoReturn:
    """End at once: a call to a tracker that hangs must not hold this process."""
    os._exit(code)


if __name__ == "__main__":
    main()


def how_it_ended(state: dict[str, Any], records: list[Record], settings: dict[str, Any]) -> str:
    """As the run has noted it; where it could not, it is finished if its record is, and else was killed."""
    if state.get("status") in ENDED:
        return state["status"]
    last = max((record.get("epoch", 0) for record in records), default=0)
    return "FINISHED" if last >= settings.get("loop.epochs", float("inf")) else "KILLED"
