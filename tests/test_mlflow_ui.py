"""The curves of a run as a reader meets them: a real MLflow server, opened in a real browser."""
from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from training.mlflow_view import MLflowView
from training.tracking import Record, RunRecord, TrackingConfig, wall_time

if TYPE_CHECKING:
    from playwright.sync_api import Page

DEMO = Path(__file__).resolve().parent.parent / "runs"
STEPS, VALIDATIONS = 50, (10, 30, 50)
POINTS_OF_CHART = {
    "loss/train_loss_avg": STEPS,
    "scales/train_loss_02": STEPS,
    "loss/validation_loss_avg": len(VALIDATIONS),
}
QUIET_SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true",
                "DO_NOT_TRACK": "true"}
QUIET_BROWSER = ["--disable-gpu", "--disable-quic", "--disable-sync"]   # playwright turns the other background work off
ONE_SCREEN = {"width": 1800, "height": 2000}                            # a chart is drawn only once it is in view
PATIENCE = 120.0                                                        # seconds, for a busy machine


def record_at(kind: str, step: int) -> Record:
    """A record as training writes it, of a loss in zigzags: of a straight line, only the ends are drawn."""
    losses = [3 / step**0.5 + step % 2, 4 / step**0.5 + step % 2]
    return {"kind": kind, "step": step, "pflop": step * 1e-3, "loss_avg": sum(losses) / 2, "loss_last": losses[-1],
            "loss": losses, "time": wall_time()}


def write_run(folder: Path, database: str) -> str:
    """Record a short run and let MLflow have it; returns the id of its experiment."""
    record = RunRecord(folder)
    record.write([record_at("train", step) for step in range(1, STEPS + 1)])
    record.write([record_at("validation", step) for step in VALIDATIONS])
    view = MLflowView(folder, TrackingConfig(uri=database, experiment="demo"), {"model.depth": 4})
    view.notify()
    view.close(patience_seconds=PATIENCE)
    return json.loads((folder / "mlflow.json").read_text())["experiment_id"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_healthy(url: str) -> bool:
    """Whether a server at `url` answers that it is well."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture
def database(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A new database, or a copy of the one that a test names as its parameter."""
    if original := getattr(request, "param", None):
        if not original.is_file():
            pytest.skip(f"needs {original}: run make demo")
        shutil.copy(original, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def server(tmp_path: Path, database: str) -> Iterator[str]:
    """The address of an MLflow server that shows `database`."""
    port, log = free_port(), tmp_path / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--artifacts-destination",
               str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | QUIET_SERVER, stdout=output, stderr=output,
                                   start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_healthy(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < deadline, f"no MLflow server:\n{log.read_text()}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)      # the server and its worker
        process.wait()


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty page of a headless browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
    chromium = shutil.which("chromium") or pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=chromium, args=QUIET_BROWSER) as browser:
            page = browser.new_page(viewport=ONE_SCREEN)
            page.set_default_timeout(PATIENCE * 1000)
            yield page


def points_drawn(page: Page, title: str) -> int:
    """The corners of the first curve in the chart of that title, once it is drawn."""
    chart = page.get_by_test_id("experiment-view-compare-runs-card").filter(has=page.get_by_text(title, exact=True))
    curve = chart.locator(".scatterlayer path.js-line").first
    curve.wait_for(state="attached")
    return len(curve.get_attribute("d").split("L"))


@pytest.mark.slow
def test_mlflow_draws_the_curves_of_a_run(page: Page, database: str, server: str, tmp_path: Path) -> None:
    experiment = write_run(tmp_path / "demo" / "d4", database)
    page.goto(f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART")
    page.get_by_role("link", name="demo/d4").wait_for()
    assert {title: points_drawn(page, title) for title in POINTS_OF_CHART} == POINTS_OF_CHART
    page.screenshot(path=tmp_path / "charts.png")


@pytest.mark.slow
@pytest.mark.parametrize("database", [DEMO / "mlflow.db"], indirect=True)
def test_mlflow_draws_the_curves_of_the_demo(page: Page, server: str, tmp_path: Path) -> None:
    experiment = json.loads((DEMO / "digits" / "d4" / "mlflow.json").read_text())["experiment_id"]
    page.goto(f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART")  # the address that the demo prints
    page.get_by_role("link", name="digits/d4").wait_for()
    records = [json.loads(line) for line in (DEMO / "digits" / "d4" / "metrics.jsonl").read_text().splitlines()]
    num_validations = sum(record["kind"] == "validation" for record in records)
    assert points_drawn(page, "loss/validation_loss_avg") == num_validations
    assert points_drawn(page, "loss/train_loss_avg") > len(records) // 4  # plotly leaves out points on a line
    page.screenshot(path=tmp_path / "demo.png")
