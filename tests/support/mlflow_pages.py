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


class Server:
    """An MLflow server that shows `database`, which can be killed and started again at the same address."""

    def __init__(self, database: str, folder: Path) -> None:
        """folder: where the server keeps what is its own."""
        self.database, self.folder = database, folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | QUIET_SERVER,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._is_healthy():
            log = (self.folder / "server.log").read_text()
            assert self._process.poll() is None and time.monotonic() < deadline, f"no MLflow server:\n{log}"
            time.sleep(0.2)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the server and its worker
        self._process.wait()

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextmanager
def serving(database: str, folder: Path) -> Iterator[Server]:
    """A healthy server."""
    server = Server(database, folder)
    server.start()
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.kill()


@contextmanager
def browsing() -> Iterator[Page]:
    """An empty page of a headless browser; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser driver: pip install playwright")
    chromium = shutil.which("chromium") or pytest.skip("needs a browser: apt-get install chromium")
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=chromium, args=QUIET_BROWSER) as browser,
    ):
        page = browser.new_page(viewport=ONE_SCREEN)
        page.set_default_timeout(PATIENCE * 1000)
        yield page
