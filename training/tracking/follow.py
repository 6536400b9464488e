"""The process that keeps a run's page in MLflow up to its record, and the trainer's end of it.

metrics.jsonl is the queue, read in slices, so that neither an outage nor a long record costs memory. It is a process
and not a thread because a thread takes the interpreter's lock from training: while one imported mlflow, single steps
took eight times as long. Written by hand because MLflow's own asynchronous logging is such a thread, and loses what is
unsent with its process.

The trainer writes two lines to the standard input of the process: at the start, as JSON, where the curves go; at the
end, how the run has ended. `follow` is also what launchers/sync_mlflow.py calls, for a run that has ended already.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from typing import Any

from data_pipeline.files.signals import STOP_SIGNALS
from training.tracking.mlflow import (
    START_OVER,
    RunPage,
    TrackerUnavailable,
    code_version,
    read_state,
    reason,
    unavailable,
    update_state,
)
from training.tracking.record import ENVIRONMENT_URI, TrackingConfig, absolute_uri, database_file
from training.tracking.redaction import redacted_output

PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for when the parent dies
NICENESS = 10  # training goes first
POLL_SECONDS = 1.0  # between looks at metrics.jsonl
MAX_PAUSE_SECONDS = 30.0  # between attempts; the first pause is 1 s, each next one twice as long
LAST_ATTEMPTS = 3  # once training is over, a tracker that is down is not worth a long wait
RESTART_SECONDS = 60.0  # between starts of a process that does not live
PATIENCE_SECONDS = {"FINISHED": 60.0, "FAILED": 10.0, "KILLED": 10.0}  # that a run at its end waits for its page


def follow(page: RunPage, wait: Callable[[float], str], report: Callable[[str], None]) -> None:
    """Send what is new in a record until its run has ended and all of it has arrived.

    wait: waits for at most so many seconds and returns RUNNING, or how the run has ended: FINISHED, FAILED or KILLED.
    report: is told when the tracker goes away and when it is back.

    Raises:
        TrackerUnavailable: since the run has ended, three attempts have failed.
    """
    failures = last_failures = 0
    away_since, sent_before = 0.0, 0
    status = wait(0.0)
    while True:
        try:
            page.catch_up(status)
            error = None
        except Exception as raised:  # whatever a tracker throws must not end this: the record is complete
            error = raised
        if error and not failures:
            away_since, sent_before = time.monotonic(), page.num_sent
            if status == "RUNNING":
                report(f"mlflow: {reason(error)}; metrics.jsonl goes on, and is sent when the tracker is back")
        if failures and not error:
            seconds, points = time.monotonic() - away_since, page.num_sent - sent_before
            report(f"mlflow: back after {seconds:.0f} s; {points} points sent")
        if status != "RUNNING":
            if not error:
                return
            last_failures += 1
            if last_failures == LAST_ATTEMPTS:
                raise unavailable(page, error) from None
        failures = failures + 1 if error else 0
        status = wait(pause_after(last_failures or failures) if error else POLL_SECONDS)


def send(page: RunPage, status: str) -> int:
    """Send what is missing of a run that has ended with `status`, and return the number of points.

    Raises:
        BlockingIOError: another process is sending this run.
        TrackerUnavailable: three attempts have failed.
    """

    def wait(seconds: float) -> str:
        time.sleep(seconds)
        return status

    page.claim()
    try:
        follow(page, wait, _report)
    finally:
        page.release()
    return page.num_sent


def pause_after(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return min(MAX_PAUSE_SECONDS, 2.0 ** min(failures - 1, 10))


class LivePage:
    """The page of a run in MLflow while it trains; for rank 0 alone. No method waits for a tracker or raises for one.

    The first news start the process, which from then on looks at metrics.jsonl by itself. It ends with the trainer,
    whatever ends that, and a run that is started again goes on in the same MLflow run.
    """

    def __init__(self, folder: Path, config: TrackingConfig, parameters: Mapping[str, Any]) -> None:
        self.folder = folder
        self.uri = absolute_uri(config.uri)
        if config.uri == os.environ.get(ENVIRONMENT_URI):
            print(f"mlflow: the tracker is {self.uri}, as {ENVIRONMENT_URI} says", flush=True)
        self._order = {
            "config": asdict(replace(config, uri=self.uri)),
            "parameters": {name: str(value) for name, value in parameters.items()},
            "trainer": os.getpid(),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0

    @property
    def run_id(self) -> str | None:
        """Return the id of the MLflow run; None as long as there is none."""
        return read_state(self.folder).get("run_id")

    def notify(self) -> None:
        """Make sure that the process lives, since there is something to send. Costs microseconds."""
        is_alive = self._process is not None and self._process.poll() is None
        if is_alive or time.monotonic() < self._next_start:
            return
        if self._process is not None:
            code = self._process.returncode
            print(f"mlflow: the process that sends ended with code {code}; it is started again", flush=True)
        self._start()

    def start_over(self) -> None:
        """Ask for a fresh MLflow run that gets the whole record as it is now.

        Call it after `RunRecord.forget_after` of a run that was rolled back: steps taken again with other data have
        other values. The request is a file, so that it outlives an outage and this process.
        """
        try:
            (self.folder / START_OVER).touch()
        except OSError as error:
            print(f"mlflow: {error}; steps that are taken again keep the values they had there", flush=True)
        self.notify()

    def close(self, status: str) -> None:
        """Let what is left be sent and the MLflow run have its status: FINISHED, FAILED, or KILLED if it was stopped.

        Waits for at most 60 s, or 10 s for a run that is not FINISHED; a tracker that is down is asked three times. One
        line names the command that sends what could not be sent.
        """
        if self._process is None:
            return
        if self._process.poll() is not None:
            self._start()
        self._tell(status)
        try:
            code = self._process.wait(PATIENCE_SECONDS[status])
            problem = f"the process that sends ended with code {code}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
            problem = f"{self.uri} did not answer in time"
        self._hang_up()
        if code not in (0, TrackerUnavailable.exit_code):
            with suppress(OSError):  # a full disk: the record tells nearly as much
                update_state(self.folder, status=status)
            print(f"mlflow: {problem}; send the rest later: {_command(self.folder, self.uri)}", flush=True)

    def _start(self) -> None:
        """Start the process in a session of its own, deaf to what a terminal or a scheduler signals to all."""
        self._next_start = time.monotonic() + RESTART_SECONDS
        self._hang_up()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # -P: a folder `training` where the user stands is not ours
        command = [sys.executable, "-P", "-m", "training.tracking.follow", str(self.folder)]
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the process inherits this, for good
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
        except OSError as error:
            print(f"mlflow: {error}; metrics.jsonl goes on", flush=True)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        self._tell(json.dumps(self._order))

    def _tell(self, line: str) -> None:
        """Write a line to the process; one that has ended is found out by who waits for it."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()

    def _hang_up(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


def main() -> None:
    """Serve the trainer that has started this process, until its run ends or it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(NICENESS)
    with redacted_output(), FileIO(0) as orders:  # what a buffer holds, `select` does not see
        if first := orders.readline():
            _serve(Path(sys.argv[1]), json.loads(first), orders)


def _serve(folder: Path, order: dict[str, Any], orders: FileIO) -> None:
    page = RunPage(folder, TrackingConfig(**order["config"]), order["parameters"])
    status = "RUNNING"

    def note(**values: str | None) -> None:
        with suppress(OSError):  # a full disk: MLflow is told all the same
            page.note(**values)

    def wait(seconds: float) -> str:
        nonlocal status
        if os.getppid() != order["trainer"]:  # it died before this process asked for its own end
            sys.exit()
        if status != "RUNNING":
            time.sleep(seconds)
        elif select.select([orders], [], [], seconds)[0]:
            word = orders.readline().decode().strip()
            if not word:
                sys.exit()
            status = word
            note(status=status)
        return status

    note(status=status, git=code_version())
    try:
        follow(page, wait, _report)
    except TrackerUnavailable as error:
        _report(f"mlflow: {error}: {_command(folder, page.config.uri)}")
        sys.exit(error.exit_code)


def _report(line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        print(line, flush=True)


def _command(folder: Path, uri: str) -> str:
    server = "" if database_file(uri) else f" --uri {uri}"  # a server has to be named
    return f"`python launchers/sync_mlflow.py {folder}{server}`"


if __name__ == "__main__":
    main()
