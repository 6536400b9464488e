"""MLflow as a view of metrics.jsonl: what training sees of it, which is next to nothing.

The work is done by a process of its own, training/tracking/mlflow_uploader.py. Nothing here imports mlflow, waits for a tracker
or raises because of one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from training.tracking.mlflow_state import read_state
from training.tracking.mlflow_uploader import ALL_SENT, NOT_ALL_SENT, START_OVER, STOP_SIGNALS
from training.tracking.record import TrackingConfig, absolute_uri

ROOT = Path(__file__).resolve().parents[2]
RESTART_SECONDS = 60.0  # between starts of an uploader that does not live
PATIENCE_SECONDS = {"FINISHED": 60.0, "FAILED": 60.0, "KILLED": 10.0}  # who stops a run does not wait for long
GRACE_SECONDS = 2.0  # of the patience: for the uploader to say what is left


class MLflowView:
    """Shows a run in MLflow; for rank 0 alone.

    The first news start the uploader, which then looks at metrics.jsonl by itself. It ends with this process, whatever
    ends it, and a run that is started again goes on in the same MLflow run. A parameter that was changed in between
    cannot be changed in MLflow: its new value stands in the tag "changed/NAME".
    """

    def __init__(self, folder: Path, config: TrackingConfig, parameters: dict[str, Any]) -> None:
        self.folder = folder
        self._order = {
            "folder": str(folder),
            "config": asdict(replace(config, uri=absolute_uri(config.uri))),
            "parameters": {name: str(value) for name, value in parameters.items()},
            "trainer": os.getpid(),
        }
        self._process: subprocess.Popen[str] | None = None
        self._next_start = 0.0

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None as long as there is none."""
        return (read_state(self.folder) or {}).get("run_id")

    def notify(self) -> None:
        """There is something to send: make sure that the uploader lives. Costs microseconds."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() < self._next_start:
            return
        if self._process is not None:
            print(f"mlflow: the uploader ended with code {self._process.returncode}; it is started again", flush=True)
        self._start()

    def start_over(self) -> None:
        """Replace the MLflow run by a fresh one that gets the whole record, as it is now.

        For a run that was rolled back: after `RunRecord.forget_after`, since steps taken again with other data have
        other values. The request is a file, so that it outlives an outage and this process.
        """
        try:
            (self.folder / START_OVER).touch()
        except OSError as error:
            print(f"mlflow: {error}; steps that are taken again keep the values they had there", flush=True)
        self.notify()

    def close(self, status: str = "FINISHED", *, patience_seconds: float | None = None) -> None:
        """Send what is left and give the MLflow run its status: FINISHED, FAILED, or KILLED for a run that was stopped.

        Waits for at most `patience_seconds` (None: 60, of a run that was stopped 10), and for a tracker that is down
        only for three attempts. What could not be sent is said in one line, with the command that sends it.
        """
        if patience_seconds is None:
            patience_seconds = PATIENCE_SECONDS[status]
        if self._process is None:
            return
        if self._process.poll() is not None:
            self._start()
        theirs = max(patience_seconds - GRACE_SECONDS, patience_seconds / 2)
        self._tell({"status": status, "patience_seconds": theirs})
        try:
            code = self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._hang_up()
        if code not in (ALL_SENT, NOT_ALL_SENT):
            command = f"python launchers/sync_mlflow.py {self.folder}"
            print(f"mlflow: the uploader ended with code {code}; `{command}` sends what is missing", flush=True)

    def _start(self) -> None:
        """Start the uploader in a session of its own, so that what a terminal or a scheduler signals passes it by."""
        self._next_start = time.monotonic() + RESTART_SECONDS
        self._hang_up()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # -P: a folder `training` where the user stands is not ours. Signals stay blocked over the start, and in it.
        command = [sys.executable, "-P", "-m", "training.tracking.mlflow_uploader"]
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, text=True, env=environment, start_new_session=True
            )
        except OSError as error:
            print(f"mlflow: {error}; metrics.jsonl goes on", flush=True)
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        self._tell(self._order)

    def _hang_up(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _tell(self, order: dict[str, Any]) -> None:
        """Give the uploader an order; one that has ended is found out by who waits for it."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended, or was hung up on
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
