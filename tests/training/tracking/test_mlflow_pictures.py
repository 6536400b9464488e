"""Pictures lie with the MLflow run of their model; one that MLflow does not take costs one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from trackers import record_of, tracker_of, train_record

from training.tracking.mlflow_client import open_client
from training.tracking.mlflow_tracker import log_picture
from training.tracking.mlflow_uploader import Uploader
from training.tracking.record import absolute_uri


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "figure.png"
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_a_picture_lies_with_the_mlflow_run_it_belongs_to(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = absolute_uri("sqlite:///tracker/mlflow.db")
    record_of(tmp_path / "run", train_record(1))
    Uploader(tracker_of(tmp_path / "run", open_client(uri), uri=uri)).catch_up("FINISHED")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a command is started must not matter
    log_picture(tmp_path / "run", picture)
    [stored] = (tmp_path / "tracker").rglob("pictures/figure.png")
    assert stored.read_bytes() == picture.read_bytes()
    assert stored.is_relative_to(tmp_path / "tracker" / "mlflow_artifacts")
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not (tmp_path / "mlruns").exists()


def test_of_a_model_that_was_not_trained_here_nothing_is_said(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_picture(tmp_path, picture)
    log_picture(tmp_path / "var_d16.pth", picture)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "state, message",
    [
        (None, "has no mlflow.json"),
        ({"uri": "http://127.0.0.1:9", "run_id": "1"}, "is on disk only"),
        ({"uri": "sqlite:///TMP/mlflow.db", "run_id": "0" * 32}, "RESOURCE_DOES_NOT_EXIST|not found"),
        ({"uri": "http://127.0.0.1:9"}, "names no MLflow run"),
    ],
)
def test_a_picture_that_mlflow_does_not_take_costs_one_line(
    tmp_path: Path,
    picture: Path,
    state: dict[str, Any] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "metrics.jsonl").touch()
    if state is not None:
        (tmp_path / "mlflow.json").write_text(json.dumps(state).replace("TMP", str(tmp_path)))
    log_picture(tmp_path, picture)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mlflow: ")]
    assert re.search(message, line) and str(picture) in line


def test_a_machine_without_mlflow_still_draws(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    (tmp_path / "mlflow.json").write_text(json.dumps({"uri": "http://127.0.0.1:9", "run_id": "1"}))
    log_picture(tmp_path, picture)
    assert capsys.readouterr().out.count("\n") == 1
