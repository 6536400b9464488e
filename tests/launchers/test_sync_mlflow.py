"""`sync_mlflow.py RUN` sends what is missing, once, and says so in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import command
from trackers import URI, FakeMLflow, connect, points_of, record_of, train_record, validation_record

from launchers import sync_mlflow
from launchers.setup.command_line import parse
from launchers.sync_mlflow import SyncConfig
from training.tracking import follow
from training.tracking.mlflow import TrackerUnavailable, read_state, update_state
from training.tracking.record import TrackingConfig


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    monkeypatch.setattr(follow, "pause_after", lambda failures: 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)  # of whoever types the command
    return connect(FakeMLflow(), monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two epochs that was never shown anywhere."""
    folder = tmp_path / "runs" / "d16"
    record_of(folder, *[train_record(step, epoch=step / 40) for step in range(1, 81)])
    (folder / "config.yaml").write_text(f"tracking: {{uri: {URI}, experiment: study}}\nloop: {{epochs: 2.0}}\n")
    return folder


def sync(run: Path, capsys: pytest.CaptureFixture[str], *, dry_run: bool = False, **settings: str) -> str:
    """What the launcher says."""
    sync_mlflow.launch(command(SyncConfig(run=str(run), **settings), dry_run=dry_run))
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
    ("noted", "last_step", "status"),
    [
        ("FAILED", 80, "FAILED"),
        ("RUNNING", 80, "FINISHED"),
        ("RUNNING", 70, "KILLED"),
        (None, 80, "FINISHED"),
    ],
)
def test_the_mlflow_run_ends_as_the_run_did(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str], noted: str | None, last_step: int, status: str
) -> None:
    record_of(run).forget_after(last_step)
    update_state(run, status=noted)
    sync(run, capsys)
    assert client.active()[0].info.status == status


def test_another_tracker_is_named_on_the_command_line_and_stays_the_runs(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    sync(run, capsys)
    assert "http://other/#/" in sync(run, capsys, uri="http://other", experiment="moved")
    with pytest.raises(ValueError, match="names the tracker http://other; .* add --uri http://other$"):
        sync(run, capsys)  # the folder alone must not say where the token goes
    assert client.experiments.keys() == {"study", "moved"}


def test_what_is_drawn_is_what_the_run_would_have_sent_itself(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = "tracking: {uri: http://tracker:5000, every: 20, curve_unit: MFLOP, study: sizes}\n"
    (run / "config.yaml").write_text(settings)
    record = record_of(run, validation_record(80, pflop=2.0))
    sync(run, capsys)
    assert client.history() == points_of(record.read(), TrackingConfig(every=20, curve_unit="MFLOP"))
    assert client.active()[0].data.tags["study"] == "sizes"


def test_a_tracker_that_is_away_changes_nothing(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    update_state(run, status="FAILED")
    sync(run, capsys)
    noted = read_state(run)
    client.fail = lambda call: "refused"
    with pytest.raises(TrackerUnavailable, match="http://away"):
        sync(run, capsys, uri="http://away")
    assert read_state(run) == noted


@pytest.mark.parametrize(("has_steps", "said"), [(False, "nothing to do"), (True, f"to {URI}")])
def test_a_run_without_a_step_and_a_dry_run_send_nothing(
    run: Path, client: FakeMLflow, capsys: pytest.CaptureFixture[str], has_steps: bool, said: str
) -> None:
    if not has_steps:
        record_of(run).forget_after(0)
    assert said in sync(run, capsys, dry_run=has_steps)
    assert client.calls == [] and read_state(run) == {}


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no metrics.jsonl"):
        sync(tmp_path, capsys)


@pytest.mark.parametrize("arguments", [["runs/a=b"], ["run=runs/a=b"], ["uri=http://x", "runs/a=b"]])
def test_the_run_is_given_with_or_without_its_name(arguments: list[str]) -> None:
    assert parse(SyncConfig, arguments, "").config.run == "runs/a=b"


def test_the_exit_code_says_that_a_service_is_absent(
    run: Path, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client.fail = lambda call: "refused"
    monkeypatch.setattr(sys, "argv", ["sync_mlflow.py", str(run)])
    with pytest.raises(SystemExit) as ended:
        sync_mlflow.main()
    assert ended.value.code == 69
    assert capsys.readouterr().err.startswith(f"error: {URI}: ConnectionError")
