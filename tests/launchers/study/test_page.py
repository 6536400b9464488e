"""MLflow shows a study from its folders alone: complete, once, below one run; and its absence costs one line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from shown_studies import write_study
from synced_studies import a_law, connect_to, of_role, state_of, sync, without_the_last
from tiny import command
from trackers import FakeMLflow, points_of

from launchers.setup.config_files import to_yaml
from launchers.study import page as study_mlflow
from launchers.study.config import STUDY, StudyConfig
from launchers.study.fitting import FIT
from launchers.study.page import close_parent, how_the_study_ended, launch_sync, open_parent, publish
from launchers.study.reading import MeasuredRun, read_run
from training.tracking import mlflow_uploader
from training.tracking.mlflow_client import PARENT_TAG
from training.tracking.mlflow_state import ViewState, read_state
from training.tracking.mlflow_tracker import Tracker, TrackerUnavailable
from training.tracking.mlflow_uploader import send_now
from training.tracking.record import RunRecord

URI = "http://tracker:5000"
DEPTHS = (6, 8, 10)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    client = FakeMLflow()
    connect_to(client, monkeypatch)
    monkeypatch.setattr(mlflow_uploader, "pause_after", lambda failures: 0.0)
    return client


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, dict[str, MeasuredRun]]:
    """A study, and its runs as they are read, which takes a while."""
    config = write_study(tmp_path_factory.mktemp("written") / "sizes", URI, DEPTHS, unfinished=(10,))
    return config, {folder.name: read_run(folder) for folder in Path(config.folder).glob("d*")}


@pytest.fixture
def config(
    written: tuple[StudyConfig, dict[str, MeasuredRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StudyConfig:
    """Three sizes of which two are finished."""
    original, runs = written
    shutil.copytree(original.folder, tmp_path / "sizes")
    config = replace(original, folder=str(tmp_path / "sizes"))
    (tmp_path / "sizes" / STUDY).write_text(to_yaml(config))
    monkeypatch.setattr(study_mlflow, "read_run", lambda folder: runs[folder.name])
    return config


def test_an_empty_tracker_gets_all_of_it(config: StudyConfig, client: FakeMLflow) -> None:
    sync(config)
    [parent] = of_role(client, "study").values()
    children = of_role(client, "train")
    assert list(children) == ["d10-seed0", "d6-seed0", "d8-seed0"]
    assert {child.data.tags[PARENT_TAG] for child in children.values()} == {parent.info.run_id}
    for name, child in children.items():
        sent = {(metric, step): value for metric, step, value in client.points[child.info.run_id]}
        expected = points_of(RunRecord(Path(config.folder) / name).read())
        assert {key: [value] for key, value in sent.items() if not key[0].startswith("final/")} == expected
        assert len(sent) == len(client.points[child.info.run_id])
        assert any(metric == "curve/loss_avg" for metric, _ in sent)


def test_twice_changes_nothing(config: StudyConfig, client: FakeMLflow) -> None:
    open_parent(config)
    sync(config)
    before = state_of(client)
    sync(config)
    publish(config)
    assert state_of(client) == before


def test_what_mlflow_has_forgotten_or_another_tracker_never_knew_is_made_from_the_folders(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(config)
    for run in client.active()[:2]:
        client.delete_run(run.info.run_id)
    for file in Path(config.folder).rglob("mlflow.json"):
        file.unlink()
    sync(config)
    other = FakeMLflow()
    connect_to(other, monkeypatch)
    sync(replace(config, tracking=replace(config.tracking, uri="http://other:5000")))
    for each in (client, other):
        [parent] = of_role(each, "study").values()
        assert len(of_role(each, "train")) == 3
        assert {run.data.tags[PARENT_TAG] for run in of_role(each, "train").values()} == {parent.info.run_id}


def test_runs_say_what_they_are_and_finished_ones_what_they_came_to(config: StudyConfig, client: FakeMLflow) -> None:
    sync(config)
    runs = of_role(client, "train")
    d8, d10 = runs["d8-seed0"].data, runs["d10-seed0"].data
    assert (d8.tags["depth"], d8.tags["seed"], d8.tags["params_eq8"]) == ("8", "0", str(18 * 8 * 512**2))
    assert int(d8.tags["params_total"]) == round(d8.metrics["final/n_billion"] * 1e9) > int(d8.tags["params_eq8"])
    last = RunRecord(Path(config.folder) / "d8-seed0").read()[-1]
    for metric in ("loss_last", "loss_avg", "error_last", "error_avg"):
        assert d8.metrics[f"final/{metric}"] == last[metric]
    assert d8.metrics["final/pflop"] == pytest.approx(last["pflop"], rel=1e-12)
    assert "final/n_billion" in d10.metrics and "final/loss_last" not in d10.metrics
    assert len({run.data.tags["mlflow.runColor"] for run in runs.values()}) == 3


def test_the_tokenizer_and_the_data_are_those_of_the_newest_checkpoint(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(config.folder) / "d6-seed0"
    assert study_mlflow.identity_of(run) == {}
    for step, known in ((1, {"seed": 0}), (2, {"tokenizer_sha256": "ab", "data": "cd", "seed": 0})):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "identity.json").write_text(json.dumps(known))
    assert study_mlflow.identity_of(run) == {}  # they are damaged: without a manifest
    monkeypatch.setattr(
        study_mlflow, "read_manifest", lambda path: {"identity": json.loads((path / "identity.json").read_text())}
    )
    assert study_mlflow.identity_of(run) == {"tokenizer_sha256": "ab", "data_fingerprint": "cd"}


@pytest.mark.parametrize("is_first", [True, False])
def test_runs_get_below_the_study_whichever_comes_first(
    config: StudyConfig, client: FakeMLflow, is_first: bool
) -> None:
    if is_first:
        assert open_parent(config)
    tracker = Tracker(Path(config.folder) / "d6-seed0", config.tracking, {})
    send_now(tracker, "RUNNING")
    tracker.state.release()
    [child] = of_role(client, "train").values()
    assert (PARENT_TAG in child.data.tags) == is_first
    assert close_parent(config, "KILLED")
    [parent] = of_role(client, "study").values()
    assert child.data.tags[PARENT_TAG] == parent.info.run_id and parent.info.status == "KILLED"


def test_the_start_is_shown_with_the_address_of_the_view(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_parent(config)
    [parent] = of_role(client, "study").values()
    assert (parent.info.status, parent.data.tags["sizes"]) == ("RUNNING", "d6 d8 d10")
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"curves     {URI}/#/experiments/7/runs?viewStateShareKey=study-")


def test_of_a_database_the_command_that_serves_it_is_said(config: StudyConfig, client: FakeMLflow) -> None:
    config = replace(config, tracking=replace(config.tracking, uri="sqlite:///runs/mlflow.db"))
    with study_mlflow.opened(config) as view:
        line = study_mlflow.where_to_look(view)
    assert f"mlflow ui --backend-store-uri sqlite:///{Path.cwd()}/runs/mlflow.db --port 5000" in line


@pytest.mark.parametrize(
    "noted, is_finished, status",
    [("FAILED", True, "FAILED"), ("RUNNING", True, "FINISHED"), ("RUNNING", False, "KILLED"), (None, False, "KILLED")],
)
def test_a_study_ended_as_it_has_noted_or_else_as_its_runs_did(
    noted: str | None, is_finished: bool, status: str
) -> None:
    assert how_the_study_ended(noted, is_finished) == status


@pytest.mark.parametrize("has_all", [True, False])
def test_a_study_of_which_nothing_is_noted_is_finished_if_all_its_runs_are(
    config: StudyConfig, client: FakeMLflow, has_all: bool
) -> None:
    sync(without_the_last(config) if has_all else config)
    assert [run.info.status for run in of_role(client, "study").values()] == ["FINISHED" if has_all else "KILLED"]


def test_a_run_that_is_being_trained_is_left_to_itself(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = ViewState(Path(config.folder) / "d6-seed0")
    busy.claim()
    sync(config)
    busy.release()
    assert f"{config.folder}/d6-seed0: is sent by the run itself" in capsys.readouterr().out
    assert of_role(client, "train").keys() == {"d8-seed0", "d10-seed0"}
    assert [run.info.status for run in of_role(client, "study").values()] == ["RUNNING"]


def test_results_lie_on_the_page_of_the_study(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(config.folder)
    for name in (FIT, "report.md", "fig5.png", "notes.txt"):
        (folder / name).write_text(name)
    monkeypatch.setattr(study_mlflow, "read_fit", lambda folder: type("Fit", (), {"laws": (a_law(),)}))
    assert publish(config)
    [parent] = of_role(client, "study").values()
    assert {name for run, name in client.artifacts if run == parent.info.run_id} == {FIT, "report.md", "fig5.png"}
    numbers = parent.data.metrics
    assert numbers["fit/loss_avg_by_compute_exponent"] == -0.2
    assert numbers["fit/loss_avg_by_compute_irreducible"] == 4.5
    assert "fit/loss_avg_by_compute_exponent_low" not in numbers  # not a number: there were too few points
    assert len(client.points[parent.info.run_id]) == len(numbers)


def test_a_finished_study_is_finished_once_it_is_reported(config: StudyConfig, client: FakeMLflow) -> None:
    config = without_the_last(config)
    open_parent(config)
    publish(config)
    assert [run.info.status for run in of_role(client, "study").values()] == ["FINISHED"]
    assert read_state(Path(config.folder))["status"] == "FINISHED"


def test_a_report_goes_to_the_tracker_that_was_asked_for(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    for module in ("training.tracking.mlflow_tracker", "training.tracking.mlflow_study"):
        monkeypatch.setattr(f"{module}.open_client", lambda uri: asked.append(uri) or client)
    (Path(config.folder) / STUDY).unlink()
    assert publish(replace(config, tracking=replace(config.tracking, uri="http://other:5000")))
    assert set(asked) == {"http://other:5000"} and "http://other:5000/#/" in capsys.readouterr().out


@pytest.mark.parametrize("file", [FIT, "d6-seed0/config.yaml"])
def test_a_damaged_file_of_the_study_is_not_blamed_on_the_tracker(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(study_mlflow, "read_run", read_run)  # the real one
    (Path(config.folder) / file).write_text("{model: 3}")
    with pytest.raises(ValueError, match=f"{file}: ") as caught:
        sync(config)
    assert URI not in str(caught.value)


def test_a_tracker_that_is_away_costs_one_line_and_only_sync_fails(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    client.fail = lambda call: "refused"
    for show in (lambda: open_parent(config), lambda: close_parent(config, "FINISHED"), lambda: publish(config)):
        assert not show()
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith("mlflow: ") and f"`scaling_study.py sync {config.folder}`" in line
    with pytest.raises(TrackerUnavailable, match=f"^{URI}: ConnectionError: connection refused; do this again"):
        sync(config)


def test_sync_goes_on_where_a_tracker_has_left_it(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventeenth call fails, before anything is done or after all is done, until one attempt comes through."""
    monkeypatch.setattr(mlflow_uploader, "LAST_ATTEMPTS", 1)
    client.fail = lambda call: ("refused", "lost")[call % 2] if call % 17 == 0 else ""
    for failures in range(100):
        try:
            sync(config)
            break
        except TrackerUnavailable:
            continue
    assert 1 < failures < 99
    for name, child in of_role(client, "train").items():
        expected = points_of(RunRecord(Path(config.folder) / name).read())
        sent = Counter((metric, step) for metric, step, _ in client.points[child.info.run_id])
        drawn = {key: count for key, count in sent.items() if not key[0].startswith("final/")}
        assert drawn == dict.fromkeys(expected, 1)


def test_without_mlflow_nothing_is_asked_and_sync_says_so(config: StudyConfig, client: FakeMLflow) -> None:
    config = replace(config, tracking=replace(config.tracking, mlflow=False))
    assert not open_parent(config) and not close_parent(config, "FINISHED")
    with pytest.raises(ValueError, match="tracking.mlflow is false"):
        sync(config)
    assert client.calls == []


def test_a_folder_without_runs_has_nothing_to_send(tmp_path: Path, client: FakeMLflow) -> None:
    config = StudyConfig(folder=str(tmp_path), sizes=("configs/d6.yaml",))
    with pytest.raises(FileNotFoundError, match="has no run folder with a record"):
        sync(config)
    assert publish(config) and "fit" not in str(client.points)


def test_a_dry_run_sends_nothing(config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]) -> None:
    launch_sync(command(config, dry_run=True))
    assert f"points in 3 runs to {URI}" in capsys.readouterr().out and client.calls == []
