"""A real MLflow server, and its pages in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

QUIET_SERVER = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
QUIET_BROWSER = ["--disable-gpu", "--disable-quic", "--disable-sync"]  # playwright turns the other background work off
ONE_SCREEN = {"width": 1800, "height": 2000}  # a chart is drawn only once it is in view
PATIENCE = 120.0  # seconds, for a busy machine
CARD = "experiment-view-compare-runs-card"  # a chart's


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


@contextmanager
def serving(database: str, folder: Path) -> Iterator[str]:
    """The address of an MLflow server that shows `database` and keeps what is its own in `folder`."""
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--artifacts-destination"]
    command += [str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | QUIET_SERVER, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_healthy(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < deadline, f"no MLflow server:\n{log.read_text()}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the server and its worker
        process.wait()


@contextmanager
def browsing() -> Iterator[Page]:
    """An empty page of a headless browser; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
    chromium = shutil.which("chromium") or pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=chromium, args=QUIET_BROWSER) as browser:
            page = browser.new_page(viewport=ONE_SCREEN)
            page.set_default_timeout(PATIENCE * 1000)
            yield page
