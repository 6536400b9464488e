"""metrics.jsonl is the record; MLflow is a view of it that is complete, free of duplicates, and never in the way."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from training.tracking import (
    MLflowView,
    Record,
    RunRecord,
    TrackingConfig,
    absolute_uri,
    artifact_folder,
    flatten_metrics,
    log_picture,
)

FAILURE_SECONDS = 30  # far above what refused connections take, far below what a silent retry loop would


def train_record(step: int, **values: object) -> Record:
    return {"kind": "train", "step": step, "time": 1000.0 + step, "loss_avg": 1 / step} | values


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord(tmp_path / "run")


def test_what_is_written_is_read_back_in_order(record: RunRecord) -> None:
    written = [train_record(step, error=[0.5, 0.25]) for step in (1, 2, 3)]
    record.write(written[:2])
    record.write(written[2:])
    assert record.read() == written
    assert len(record.path.read_text().splitlines()) == 3


def test_numbers_that_json_does_not_have_are_written_as_null_and_not_drawn(record: RunRecord) -> None:
    record.write([train_record(1, gradient_norm=float("inf"))])
    assert record.read()[0]["gradient_norm"] is None
    assert not any("gradient_norm" in name for name in flatten_metrics(record.read()[0]))


def test_a_record_that_does_not_exist_yet_is_empty(record: RunRecord) -> None:
    assert record.read() == []


def test_a_last_line_cut_by_a_crash_is_left_out(record: RunRecord) -> None:
    record.write([train_record(1), train_record(2)])
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[:-5])
    assert record.read() == [train_record(1)]


def test_steps_after_the_checkpoint_are_forgotten(record: RunRecord) -> None:
    record.write([train_record(step) for step in (1, 2, 3, 4)])
    record.forget_after(2)
    assert [entry["step"] for entry in record.read()] == [1, 2]


def test_a_resumed_run_writes_on_after_a_cut_line(record: RunRecord) -> None:
    record.write([train_record(1), train_record(2)])
    record.path.write_bytes(record.path.read_bytes()[:-5])
    record.forget_after(1)
    record.write([train_record(2)])
    assert [entry["step"] for entry in record.read()] == [1, 2]


def test_a_new_run_that_forgets_everything_has_an_empty_record(record: RunRecord) -> None:
    record.write([train_record(1)])
    record.forget_after(0)
    assert record.read() == []


def test_metrics_stand_in_sections_and_are_numbered_by_scale() -> None:
    entry = {"kind": "train", "step": 3, "time": 9.0, "samples_seen": 24, "loss_avg": 2.0, "loss": [1.0, 2.0, 3.0]}
    assert flatten_metrics(entry) == {
        "progress/train_samples_seen": 24.0,
        "loss/train_loss_avg": 2.0,
        "scales/train_loss_01": 1.0,
        "scales/train_loss_02": 2.0,
        "scales/train_loss_03": 3.0,
    }


def test_the_step_and_the_time_are_no_metrics() -> None:
    drawn = flatten_metrics({"kind": "validation", "step": 3, "time": 9.0, "loss_avg": 2.0})
    assert drawn == {"loss/validation_loss_avg": 2.0}


def test_a_relative_database_is_made_absolute_and_other_trackers_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (tmp_path / "runs").is_dir()
    assert absolute_uri("http://host:5000") == "http://host:5000"


def test_mlflow_gets_every_point_once_even_when_the_run_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    folder = tmp_path / "digits" / "d2"
    record = RunRecord(folder)
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test")

    record.write([train_record(step, loss=[2.0, 3.0]) for step in range(1, 31)])  # more than one batch of 20
    first = MLflowView(folder, config, {"model.depth": 2})
    record.write([{"kind": "validation", "step": 30, "time": 1030.0, "loss_avg": 0.5}])
    first.notify()
    first.close()
    run_id = json.loads((folder / "mlflow.json").read_text())["run_id"]
    record.forget_after(25)  # killed at 30, resumed from a checkpoint at 25: some steps are taken, and timed, anew
    second = MLflowView(folder, config, {"model.depth": 2})
    record.write([train_record(step, loss=[2.0, 3.0]) | {"time": 5000.0 + step} for step in range(26, 41)])
    second.notify()
    second.close()

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=config.uri)
    assert json.loads((folder / "mlflow.json").read_text())["run_id"] == run_id
    runs = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    found = [(run.info.run_id, run.info.run_name, run.info.status) for run in runs]
    assert found == [(run_id, "digits/d2", "FINISHED")]
    assert runs[0].data.params == {"model.depth": "2"}
    for name in ("loss/train_loss_avg", "scales/train_loss_02"):
        assert [point.step for point in client.get_metric_history(run_id, name)] == list(range(1, 41))
    assert [point.value for point in client.get_metric_history(run_id, "loss/validation_loss_avg")] == [0.5]


def test_a_dead_tracker_neither_raises_nor_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    record = RunRecord(tmp_path)
    started = time.monotonic()
    view = MLflowView(tmp_path, TrackingConfig(uri="http://127.0.0.1:9"), {})
    record.write([train_record(1)])
    view.notify()
    assert time.monotonic() - started < 2  # training goes on at once
    view.close(patience_seconds=FAILURE_SECONDS)
    assert time.monotonic() - started < FAILURE_SECONDS
    assert "mlflow: " in capfd.readouterr().out
    assert record.read() == [train_record(1)]


def test_closing_gives_up_on_a_tracker_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLflowView, "_connect", lambda self: threading.Event().wait())
    view = MLflowView(tmp_path, TrackingConfig(), {})
    view.notify()
    started = time.monotonic()
    view.close(patience_seconds=0.1)
    assert time.monotonic() - started < 2


def test_what_is_written_while_the_tracker_is_slow_is_sent_before_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    sending = threading.Event()

    def send_slowly(view: MLflowView, records: list[dict[str, Any]], client: Any, state: dict[str, Any]) -> None:
        sending.set()
        time.sleep(0.1)
        sent.extend(record["step"] for record in records)

    client = SimpleNamespace(set_terminated=lambda run_id, status: None)
    monkeypatch.setattr(MLflowView, "_connect", lambda self: (client, {"run_id": "1", "train": -1, "validation": -1}))
    monkeypatch.setattr(MLflowView, "_send", send_slowly)
    view = MLflowView(tmp_path, TrackingConfig(), {})
    view.record.write([train_record(1)])
    view.notify()
    sending.wait(10)
    view.record.write([train_record(2)])
    view.close()
    assert sent == [1, 2]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "figure.png"
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_a_picture_lies_with_the_mlflow_run_it_belongs_to(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrackingConfig(uri="sqlite:///tracker/mlflow.db")
    view = MLflowView(tmp_path / "run", config, {})
    view.record.write([train_record(1)])
    view.notify()
    view.close()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where a command is started must not matter
    log_picture(tmp_path / "run", picture)
    [stored] = (tmp_path / "tracker").rglob("pictures/figure.png")
    assert stored.read_bytes() == picture.read_bytes()
    assert stored.is_relative_to(tmp_path / "tracker" / "mlflow_artifacts")
    assert list((tmp_path / "elsewhere").iterdir()) == [] and not (tmp_path / "mlruns").exists()


def test_only_a_database_file_has_a_folder_of_pictures_beside_it() -> None:
    assert artifact_folder("sqlite:////data/mlflow.db") == "/data/mlflow_artifacts"
    assert artifact_folder("http://host:5000") is None


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
        ({"run_id": "1"}, "KeyError"),
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
