"""`sync_mlflow.py RUN` sends what is missing, once, and says so in one line."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from repository import CONFIGS
from tiny import command
from trackers import FakeMLflow, points_of, record_of, train_record, validation_record

from data_pipeline.files.nested import flatten
from launchers import sync_mlflow
from launchers.setup.command_line import parse
from launchers.setup.config_files import load_config, read_settings, to_yaml
from launchers.setup.settings import TrainConfig
from launchers.sync_mlflow import SyncConfig
from training.tracking import mlflow_uploader
from training.tracking.mlflow_state import ViewState, read_state
from training.tracking.mlflow_tracker import TrackerUnavailable
from training.tracking.record import TrackingConfig

URI = "http://tracker:5000"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    client = FakeMLflow()
    monkeypatch.setattr("training.tracking.mlflow_tracker.open_client", lambda uri: client)
    monkeypatch.setattr(mlflow_uploader, "pause_after", lambda failures: 0.0)
    return client


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two epochs that was never shown anywhere."""
    folder = tmp_path / "runs" / "d16"
    record_of(folder, *[train_record(step, epoch=step / 40) for step in range(1, 81)])
    (folder / "config.yaml").write_text(f"tracking: {{uri: {URI}, experiment: study}}\nloop: {{epochs: 2.0}}\n")
    return folder


def sync(run: Path, capsys: pytest.CaptureFixture[str], **settings: str) -> str:
    """What the launcher says; as the process would at its end, it leaves the run to others."""
    claimed: list[ViewState] = []
    claim = ViewState.claim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViewState, "claim", lambda state: (claimed.append(state), claim(state))[1])
        try:
            sync_mlflow.launch(command(SyncConfig(run=str(run), **settings)))
        finally:
            for state in claimed:
                state.release()
    return capsys.readouterr().out


def test_twice_is_once(run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]) -> None:
    number = len(points_of(record_of(run).read()))
    said = sync(run, capsys)
    assert said == f"{run}: {number} points sent, 0 were there already; {URI}/#/experiments/7/runs/{1:032x}\n"
    (run / "mlflow.json").unlink()
    assert f"0 points sent, {number} were there already" in sync(run, capsys)
    assert client.history() == points_of(record_of(run).read())
    assert client.active()[0].data.params["loop.epochs"] == "2.0" and client.experiments == {"study": "7"}


@pytest.mark.parametrize(
    "noted, last_step, status",
    [
        ("FAILED", 80, "FAILED"),
        ("KILLED", 80, "KILLED"),
        ("RUNNING", 80, "FINISHED"),
        ("RUNNING", 70, "KILLED"),
        (None, 80, "FINISHED"),
    ],
)
def test_the_mlflow_run_ends_as_the_run_did(
    run: Path,
    client: FakeMLflow,
    noted: str | None,
    last_step: int,
    status: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record_of(run).forget_after(last_step)
    ViewState(run).update(status=noted)
    sync(run, capsys)
    assert client.active()[0].info.status == status


def test_another_tracker_is_named_on_the_command_line_and_stays_the_runs(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    sync(run, capsys)
    assert "http://other/#/" in sync(run, capsys, uri="http://other", experiment="moved")
    assert "http://other/#/" in sync(run, capsys)
    assert client.experiments.keys() == {"study", "moved"}
    assert read_state(run)["uri"] == "http://other"


def test_what_is_drawn_is_what_the_run_would_have_sent_itself(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = "tracking: {uri: http://tracker:5000, every: 20, curve_unit: MFLOP, study: sizes}\n"
    (run / "config.yaml").write_text(settings)
    record = record_of(run, validation_record(80, pflop=2.0))
    sync(run, capsys)
    assert client.history() == points_of(record.read(), TrackingConfig(every=20, curve_unit="MFLOP"))
    assert client.active()[0].data.tags["study"] == "sizes"


def test_a_tracker_that_is_away_is_said_to_be_and_changes_nothing(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    ViewState(run).update(status="FAILED")
    sync(run, capsys)
    noted = read_state(run)
    client.fail = lambda call: "refused"
    with pytest.raises(TrackerUnavailable, match="http://away"):
        sync(run, capsys, uri="http://away")
    assert read_state(run) == noted
    client.fail = lambda call: ""
    sync(run, capsys, uri="http://other")
    assert read_state(run)["status"] == "FAILED"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl"):
        sync_mlflow.launch(command(SyncConfig(run=str(tmp_path))))


def test_a_run_without_a_step_has_nothing_to_send(
    tmp_path: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    record_of(tmp_path)
    assert "nothing to do" in sync(tmp_path, capsys)
    assert client.calls == []


def test_a_dry_run_sends_nothing(run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]) -> None:
    sync_mlflow.launch(command(SyncConfig(run=str(run)), dry_run=True))
    assert f"to {URI}" in capsys.readouterr().out
    assert client.calls == [] and read_state(run) is None


def test_the_run_is_given_with_or_without_its_name() -> None:
    for arguments in (["runs/a=b"], ["run=runs/a=b"], ["--run", "runs/a=b"], ["--uri", "http://x", "runs/a=b"]):
        assert parse(SyncConfig, arguments, "").config.run == "runs/a=b"
    with pytest.raises(ValueError, match="'runs/c' is not a setting"):
        parse(SyncConfig, ["runs/b", "runs/c"], "")


def test_settings_of_a_run_read_as_they_were_logged(tmp_path: Path) -> None:
    config = load_config(TrainConfig, str(CONFIGS / "d16.yaml"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    logged = {name: str(value) for name, value in flatten(asdict(config)).items()}
    assert {name: str(value) for name, value in read_settings(tmp_path / "config.yaml").items()} == logged
    assert read_settings(tmp_path / "none.yaml") == {}


def test_the_exit_code_says_that_a_service_is_absent(
    run: Path, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client.fail = lambda call: "refused"
    monkeypatch.setattr(sys, "argv", ["sync_mlflow.py", str(run)])
    with pytest.raises(SystemExit) as ended:
        sync_mlflow.main()
    assert ended.value.code == 69
    assert capsys.readouterr().err.startswith(f"error: {URI}: ConnectionError")
