"""A tracker that is away: a server is killed, a database is locked; training goes on as before, and no point is lost.

Steps are compared with the median step of the same run while the tracker is up. The machine has other work, which
lengthens single steps too. What tracking can have added to a step is therefore measured beside it: the call that tells
of news, and all that the sending process computed meanwhile, as if it had taken every bit of that from training.
"""

from __future__ import annotations

import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_pages import serving
from trackers import points_of, sender_of

from models.var import VAR, VARConfig
from training.tracking.follow import LivePage
from training.tracking.record import RunRecord, TrackingConfig, wall_time

UP_SECONDS, AWAY_SECONDS, CATCH_UP_SECONDS = 8.0, 40.0, 3.0
CONFIG = VARConfig(depth=3, patch_nums=(1, 2, 3, 4), vocab_size=64, code_width=8, num_classes=10)
BATCH = 12
ATTEMPT_SECONDS = 0.002  # that the process computes in a step, if it tries again in it

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
        self.page = LivePage(folder, TrackingConfig(uri=uri, experiment="faults"), {"model.depth": CONFIG.depth})
        self.step = 0
        self._clock: int | None = None

    def run(self, seconds: float) -> tuple[list[float], list[float]]:
        """Train for a while: the seconds of each step, and those of them that tracking can have taken."""
        whole, tracking = [], []
        self._clock = self._clock_of_sender()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start, used = time.monotonic(), self._seconds_of_sender()
            losses = self._take_step()
            self.record.write([{"kind": "train", "step": self.step, "time": wall_time()} | losses])
            written = time.monotonic()
            self.page.notify()
            whole.append(time.monotonic() - start)
            tracking.append(time.monotonic() - written + self._seconds_of_sender() - used)
        return whole, tracking

    def _clock_of_sender(self) -> int | None:
        """The clock that Linux keeps for what a process computes, by its number."""
        process = sender_of(self.record.path.parent)
        return (~process << 3) | 2 if process else None

    def _seconds_of_sender(self) -> float:
        return time.clock_gettime(self._clock) if self._clock else 0.0

    def _take_step(self) -> dict[str, Any]:
        logits = self.model(self.inputs, self.labels).transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, self.codes, reduction="none").mean(dim=0)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        scales = [losses[part].mean().item() for part in CONFIG.scales.slices]
        return {"loss_avg": losses.mean().item(), "loss": scales}


def train_through_an_outage(
    training: Training, go: Callable[[], object], come_back: Callable[[], object], what: str, figures: dict[str, str]
) -> None:
    """Check that no step is slower than twice the median for the outage."""
    training.run(UP_SECONDS)  # the process starts, finds its tracker and makes the run
    up, _ = training.run(UP_SECONDS)
    assert training.page.run_id is not None
    go()
    away, tracking = training.run(AWAY_SECONDS)
    come_back()
    training.run(CATCH_UP_SECONDS)
    training.page.close("FINISHED")
    median = statistics.median(up)
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
    assert max(tracking) < median
    assert statistics.median(attempts) < 2 * statistics.median(others)


def check_points(training: Training, uri: str, said: str, what: str, figures: dict[str, str]) -> None:
    """Check that MLflow has each point of the record once, and that two lines tell of the outage."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    names = client.get_run(training.page.run_id).data.metrics
    points = (point for name in names for point in client.get_metric_history(training.page.run_id, name))
    found = Counter((point.key, point.step, point.value) for point in points)
    expected = Counter((name, step, value) for (name, step), [value] in points_of(training.record.read()).items())
    lost, doubled = expected - found, found - expected
    figures[f"MLflow, {what}: points"] = f"{expected.total()}; lost {lost.total()}, doubled {doubled.total()}"
    assert not lost and not doubled
    lines = [line for line in said.splitlines() if line.startswith("mlflow:")]
    assert len(lines) == 2 and "metrics.jsonl goes on" in lines[0] and "back after" in lines[1], said


def test_a_server_that_is_killed_and_comes_back(
    tmp_path: Path, figures: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    what = f"server killed for {AWAY_SECONDS:.0f} s"
    with serving(f"sqlite:///{tmp_path}/server.db", tmp_path) as server:
        training = Training(tmp_path / "run", server.url)

        def come_back() -> None:
            server.start()
            server.wait_until_healthy()

        train_through_an_outage(training, server.kill, come_back, what, figures)
        check_points(training, server.url, capfd.readouterr().out, what, figures)


def test_a_database_that_is_locked(tmp_path: Path, figures: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    what, uri = f"SQLite locked for {AWAY_SECONDS:.0f} s", f"sqlite:///{tmp_path}/mlflow.db"
    training = Training(tmp_path / "run", uri)
    other = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    try:
        other.execute("PRAGMA busy_timeout = 60000")
        train_through_an_outage(
            training, lambda: other.execute("BEGIN EXCLUSIVE"), lambda: other.execute("ROLLBACK"), what, figures
        )
    finally:
        other.close()
    check_points(training, uri, capfd.readouterr().out, what, figures)
