"""The curves of a run as a reader meets them: a real MLflow server, opened in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow_pages import CARD, browsing, serving

from training.tracking.follow import LivePage
from training.tracking.record import Record, RunRecord, TrackingConfig, wall_time

if TYPE_CHECKING:
    from playwright.sync_api import Page

STEPS, VALIDATIONS = 50, (10, 30, 50)
POINTS_OF_CHART = {
    "loss/train_loss_avg": STEPS,
    "scales/train_loss_02": STEPS,
    "loss/validation_loss_avg": len(VALIDATIONS),
}


def record_at(kind: str, step: int) -> Record:
    """A record as training writes it, of a loss in zigzags: of a straight line, only the ends are drawn."""
    losses = [3 / step**0.5 + step % 2, 4 / step**0.5 + step % 2]
    return {
        "kind": kind,
        "step": step,
        "pflop": step * 1e-3,
        "loss_avg": sum(losses) / 2,
        "loss_last": losses[-1],
        "loss": losses,
        "time": wall_time(),
    }


def write_run(folder: Path, database: str) -> str:
    """Record a short run and let MLflow have it; returns the id of its experiment."""
    record = RunRecord(folder)
    record.write([record_at("train", step) for step in range(1, STEPS + 1)])
    record.write([record_at("validation", step) for step in VALIDATIONS])
    page = LivePage(folder, TrackingConfig(uri=database, experiment="demo"), {"model.depth": 4})
    page.notify()
    page.close("FINISHED")
    return json.loads((folder / "mlflow.json").read_text())["experiment_id"]


def points_drawn(page: Page, title: str) -> int:
    """The corners of the first curve in the chart of that title, once it is drawn."""
    chart = page.get_by_test_id(CARD).filter(has=page.get_by_text(title, exact=True))
    curve = chart.locator(".scatterlayer path.js-line").first
    curve.wait_for(state="attached")
    return len(curve.get_attribute("d").split("L"))


@pytest.mark.slow
def test_mlflow_draws_the_curves_of_a_run(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/mlflow.db"
    experiment = write_run(tmp_path / "demo" / "d4", database)
    with serving(database, tmp_path) as server, browsing() as page:
        page.goto(f"{server.url}/#/experiments/{experiment}/runs?compareRunsMode=CHART")
        page.get_by_role("link", name="demo/d4").wait_for()
        assert {title: points_drawn(page, title) for title in POINTS_OF_CHART} == POINTS_OF_CHART
