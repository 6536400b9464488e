"""A tracker that is away: two minutes without a server, a minute with a locked database; training goes on as before.

Steps are compared with the median step of the same run while the tracker is up. The machine has other work, which
lengthens single steps too. What tracking can have added to a step is therefore measured beside it: the call that tells
of news, and all that the uploader computed meanwhile, as if it had taken every bit of that from training.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from trackers import points_of

from models.var import VAR, VARConfig
from training.tracking.mlflow_view import MLflowView
from training.tracking.record import RunRecord, TrackingConfig, wall_time

QUIET_SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
START_SECONDS = 240.0  # for a server on a busy machine
UP_SECONDS, SERVER_DOWN_SECONDS, LOCKED_SECONDS, CATCH_UP_SECONDS = 30.0, 120.0, 60.0, 60.0
CONFIG = VARConfig(depth=3, patch_nums=(1, 2, 3, 4), vocab_size=64, code_width=8, num_classes=10)
BATCH = 12

ATTEMPT_SECONDS = 0.002  # that an uploader computes in a step, if it tries again in it

pytestmark = pytest.mark.faults


class Training:
    """Real steps of a small VAR, every one recorded; what each took, and how much of it tracking can have."""

    def __init__(self, folder: Path, uri: str) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = CONFIG.scales.num_tokens
        self.inputs = torch.randn(BATCH, tokens - 1, CONFIG.code_width, generator=generator)
        self.codes = torch.randint(CONFIG.vocab_size, (BATCH, tokens), generator=generator)
        self.labels = torch.arange(BATCH) % CONFIG.num_classes
        self.model = VAR(CONFIG, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.record = RunRecord(folder)
        self.view = MLflowView(folder, TrackingConfig(uri=uri, experiment="faults"), {"model.depth": CONFIG.depth})
        self.step = 0

    def run(self, seconds: float) -> tuple[list[float], list[float]]:
        """Train for a while: the seconds of each step, and those of them that tracking can have taken."""
        whole, tracking = [], []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start, used = time.monotonic(), self._seconds_of_uploader()
            losses = self._take_step()
            self.record.write([{"kind": "train", "step": self.step, "time": wall_time()} | losses])
            written = time.monotonic()
            self.view.notify()
            whole.append(time.monotonic() - start)
            tracking.append(time.monotonic() - written + self._seconds_of_uploader() - used)
        return whole, tracking

    def _seconds_of_uploader(self) -> float:
        """What the uploader has computed so far, by the clock that Linux keeps for its process."""
        process = self.view._process
        return time.clock_gettime((~process.pid << 3) | 2) if process and process.poll() is None else 0.0

    def _take_step(self) -> dict[str, Any]:
        logits = self.model(self.inputs, self.labels).transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, self.codes, reduction="none").mean(dim=0)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        scales = [losses[part].mean().item() for part in CONFIG.scales.slices]
        return {"loss_avg": losses.mean().item(), "loss": scales}


class Server:
    """An MLflow server on a database file, which can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{folder}/server.db"
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database, "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.log.parent,
                env=os.environ | QUIET_SERVER,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        limit = time.monotonic() + START_SECONDS
        while time.monotonic() < limit:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.5)
        raise TimeoutError(f"no MLflow server:\n{self.log.read_text()}")

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        server.start()
        server.wait_until_healthy()
        yield server
    finally:
        server.kill()


def histories(uri: str, run_id: str) -> Counter[tuple[str, int, float]]:
    """Every point that MLflow has of a run, as often as it has it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = client.get_run(run_id).data.metrics
    points = (point for name in names for point in client.get_metric_history(run_id, name))
    return Counter((point.key, point.step, point.value) for point in points)


def through_an_outage(
    training: Training, away_seconds: float, go: Callable[[], None], come_back: Callable[[], None]
) -> tuple[list[float], list[float], list[float]]:
    """Train before, in and after an outage: seconds of steps while up, while away, and of tracking in the latter."""
    training.run(UP_SECONDS)  # the uploader starts, finds its tracker and makes the run
    up, _ = training.run(UP_SECONDS)
    assert training.view.run_id is not None
    go()
    away, tracking = training.run(away_seconds)
    come_back()
    training.run(CATCH_UP_SECONDS)
    training.view.close()
    return up, away, tracking


def check(up: list[float], away: list[float], tracking: list[float], what: str, figures: dict[str, str]) -> None:
    """No step is slower than twice the median for the outage: what tracking can have added is less than another one."""
    median, high = statistics.median(up), statistics.quantiles(away, n=100)[98]
    slow_up, slow_away = (sum(step > 2 * median for step in steps) / len(steps) for steps in (up, away))
    attempts = [step for step, added in zip(away, tracking, strict=True) if added >= ATTEMPT_SECONDS]
    others = [step for step, added in zip(away, tracking, strict=True) if added < ATTEMPT_SECONDS]
    figures[f"MLflow, {what}: what it can have added to a step"] = (
        f"at most {max(tracking) * 1e3:.0f} ms, {max(tracking) / median:.0%} of the median {median * 1e3:.0f} ms; "
        f"{sum(tracking) / sum(away):.2%} in all"
    )
    figures[f"MLflow, {what}: steps with a failing call beside them"] = (
        f"{len(attempts)} of {len(away)}, median "
        f"{statistics.median(attempts) / statistics.median(others):.2f} x that of the others"
    )
    figures[f"MLflow, {what}: steps by any cause"] = (
        f"99th percentile {high / median:.2f} x the median before, slowest {max(away) / median:.2f} x; above twice it "
        f"{slow_away:.1%}, before {slow_up:.1%}"
    )
    assert max(tracking) < median
    assert statistics.median(attempts) < 2 * statistics.median(others)


def check_points(training: Training, uri: str, said: str, what: str, figures: dict[str, str]) -> None:
    expected = Counter((name, step, value) for (name, step), [value] in points_of(training.record.read()).items())
    found = histories(uri, training.view.run_id or "")
    lost, doubled = expected - found, found - expected
    figures[f"MLflow, {what}: points"] = f"{expected.total()}; lost {lost.total()}, doubled {doubled.total()}"
    assert not lost and not doubled
    lines = [line for line in said.splitlines() if line.startswith("mlflow:")]
    assert len(lines) == 2 and "metrics.jsonl goes on" in lines[0] and "back after" in lines[1], said


def test_a_server_that_is_down_for_two_minutes(
    tmp_path: Path, server: Server, figures: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    what = f"server killed for {SERVER_DOWN_SECONDS:.0f} s"
    training = Training(tmp_path / "run", server.url)
    steps = through_an_outage(training, SERVER_DOWN_SECONDS, server.kill, server.start)
    server.wait_until_healthy()
    check_points(training, server.url, capfd.readouterr().out, what, figures)
    check(*steps, what, figures)


def test_a_database_that_is_locked_for_a_minute(
    tmp_path: Path, figures: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    what = f"SQLite locked for {LOCKED_SECONDS:.0f} s"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    training = Training(tmp_path / "run", uri)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    try:
        other.execute("PRAGMA busy_timeout = 60000")
        steps = through_an_outage(
            training, LOCKED_SECONDS, lambda: other.execute("BEGIN EXCLUSIVE"), lambda: other.execute("ROLLBACK")
        )
    finally:
        other.close()
    check_points(training, uri, capfd.readouterr().out, what, figures)
    check(*steps, what, figures)
