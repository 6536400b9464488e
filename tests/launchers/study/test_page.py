"""MLflow shows a study from its folders alone: complete, once, below one run; and its absence costs one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from shown_studies import write_study
from tiny import command
from trackers import URI, FakeMLflow, connect, points_of

from launchers.setup.config_files import to_yaml
from launchers.study import page as study_page
from launchers.study.config import STUDY, StudyConfig
from launchers.study.fitting import FIT
from launchers.study.page import close_parent, launch_sync, open_parent, publish
from launchers.study.reading import MeasuredRun, read_run
from training.laws.study_fit import Interval, PowerLaw
from training.tracking import follow
from training.tracking.mlflow import PARENT_TAG, RunPage, TrackerUnavailable, read_state, update_state
from training.tracking.record import RunRecord

DEPTHS = (6, 8, 10)
NAMES = {"d6-seed0", "d8-seed0", "d10-seed0"}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    monkeypatch.setattr(follow, "pause_after", lambda failures: 0.0)
    return connect(FakeMLflow(), monkeypatch)


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
    monkeypatch.setattr(study_page, "read_run", lambda folder: runs[folder.name])
    return config


def without_the_last(config: StudyConfig) -> StudyConfig:
    """The two sizes that are finished."""
    shutil.rmtree(Path(config.folder) / "d10-seed0")
    config = replace(config, sizes=config.sizes[:2])
    (Path(config.folder) / STUDY).write_text(to_yaml(config))
    return config


def elsewhere(config: StudyConfig, uri: str) -> StudyConfig:
    return replace(config, tracking=replace(config.tracking, uri=uri))


def sync(config: StudyConfig) -> None:
    launch_sync(command(config))


def of_role(client: FakeMLflow, role: str) -> dict[str, Any]:
    """The active runs of a role by their names."""
    return {run.info.run_name: run for run in client.active() if run.data.tags["role"] == role}


def state_of(client: FakeMLflow) -> Any:
    """All that a tracker holds; points that were drawn twice count twice."""
    drawn = {run: Counter(points) for run, points in client.points.items()}
    return copy.deepcopy((client.runs, drawn, client.artifacts, client.experiment_tags))


def assert_complete(config: StudyConfig, client: FakeMLflow) -> None:
    """Each run of the study is there once, below the study, with each point of its record once."""
    [parent] = of_role(client, "study").values()
    children = of_role(client, "train")
    assert children.keys() == NAMES
    for name, child in children.items():
        assert child.data.tags[PARENT_TAG] == parent.info.run_id
        expected = points_of(RunRecord(Path(config.folder) / name).read())
        sent = Counter((metric, step, value) for metric, step, value in client.points[child.info.run_id])
        drawn = {key: count for key, count in sent.items() if not key[0].startswith("final/")}
        assert drawn == {(*key, value): 1 for key, [value] in expected.items()}
        assert any(metric == "curve/loss_avg" for metric, *_ in drawn)


def test_an_empty_tracker_gets_all_of_it_and_a_second_time_changes_nothing(
    config: StudyConfig, client: FakeMLflow
) -> None:
    open_parent(config)
    sync(config)
    assert_complete(config, client)
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
    assert_complete(config, client)
    other = connect(FakeMLflow(), monkeypatch)
    sync(elsewhere(config, "http://other:5000"))
    assert_complete(config, other)


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
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity() -> list[str | None]:
        sync(config)
        tags = of_role(client, "train")["d6-seed0"].data.tags
        return [tags.get("tokenizer_sha256"), tags.get("data_fingerprint")]

    assert identity() == [None, None]
    for step, known in ((1, {"seed": 0}), (2, {"tokenizer_sha256": "ab", "data": "cd", "seed": 0})):
        folder = Path(config.folder) / "d6-seed0" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "identity.json").write_text(json.dumps(known))
    assert identity() == [None, None]  # they are damaged: without a manifest
    manifest = lambda path: {"identity": json.loads((path / "identity.json").read_text())}  # noqa: E731
    monkeypatch.setattr(study_page, "read_manifest", manifest)
    assert identity() == ["ab", "cd"]


@pytest.mark.parametrize("is_first", [True, False])
def test_runs_get_below_the_study_whichever_comes_first(
    config: StudyConfig, client: FakeMLflow, is_first: bool
) -> None:
    if is_first:
        open_parent(config)
    follow.send(RunPage(Path(config.folder) / "d6-seed0", config.tracking, {}), "KILLED")
    [child] = of_role(client, "train").values()
    assert (PARENT_TAG in child.data.tags) == is_first
    close_parent(config, "KILLED")
    [parent] = of_role(client, "study").values()
    assert child.data.tags[PARENT_TAG] == parent.info.run_id and parent.info.status == "KILLED"


@pytest.mark.parametrize(
    ("noted", "is_finished", "status"),
    [("FAILED", True, "FAILED"), ("RUNNING", True, "FINISHED"), ("RUNNING", False, "KILLED"), (None, True, "FINISHED")],
)
def test_a_study_ended_as_it_has_noted_or_else_as_its_runs_did(
    config: StudyConfig, client: FakeMLflow, noted: str | None, is_finished: bool, status: str
) -> None:
    update_state(Path(config.folder), status=noted)
    sync(without_the_last(config) if is_finished else config)
    assert [run.info.status for run in of_role(client, "study").values()] == [status]


def test_a_run_that_is_being_trained_is_left_to_itself(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = RunPage(Path(config.folder) / "d6-seed0", config.tracking, {})
    busy.claim()
    sync(config)
    busy.release()
    assert f"{config.folder}/d6-seed0: is sent by the run itself" in capsys.readouterr().out
    assert of_role(client, "train").keys() == NAMES - {"d6-seed0"}
    assert [run.info.status for run in of_role(client, "study").values()] == ["RUNNING"]


def test_results_lie_on_the_page_of_the_study(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (FIT, "report.md", "fig5.png", "notes.txt"):
        (Path(config.folder) / name).write_text(name)
    unknown = Interval(float("nan"), float("nan"))  # there were too few points
    law = SimpleNamespace(law=PowerLaw(exponent=-0.2, scale=2.0, irreducible=4.5), exponent_interval=unknown)
    vars(law).update(metric="loss_avg", variable="compute", pearson=-0.99, r_squared=0.98)
    monkeypatch.setattr(study_page, "read_fit", lambda folder: SimpleNamespace(laws=(law,)))
    publish(config)
    [parent] = of_role(client, "study").values()
    assert {name for run, name in client.artifacts if run == parent.info.run_id} == {FIT, "report.md", "fig5.png"}
    expected = {"exponent": -0.2, "scale": 2.0, "irreducible": 4.5, "pearson": -0.99, "r_squared": 0.98}
    assert parent.data.metrics == {f"fit/loss_avg_by_compute_{name}": value for name, value in expected.items()}
    assert len(client.points[parent.info.run_id]) == len(expected)


def test_a_finished_study_is_finished_once_it_is_reported_on_the_tracker_that_is_asked_for(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    config = elsewhere(without_the_last(config), "http://other:5000")
    open_parent(config)
    (Path(config.folder) / STUDY).unlink()
    publish(config)
    assert [run.info.status for run in of_role(client, "study").values()] == ["FINISHED"]
    state = read_state(Path(config.folder))
    assert (state["status"], state["uri"]) == ("FINISHED", "http://other:5000")
    assert "http://other:5000/#/" in capsys.readouterr().out


@pytest.mark.parametrize("file", [FIT, "d6-seed0/config.yaml"])
def test_a_damaged_file_of_the_study_is_not_blamed_on_the_tracker(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(study_page, "read_run", read_run)  # the real one
    (Path(config.folder) / file).write_text("{model: 3}")
    with pytest.raises(ValueError, match=f"{file}: ") as caught:
        sync(config)
    assert URI not in str(caught.value)


def test_a_tracker_that_is_away_costs_one_line_and_only_sync_fails(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    client.fail = lambda call: "refused"
    for show in (open_parent, lambda config: close_parent(config, "FINISHED"), publish):
        show(config)
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith("mlflow: ") and f"`scaling_study.py sync {config.folder}`" in line
    with pytest.raises(TrackerUnavailable, match=f"^{URI}: ConnectionError: connection refused; send it again"):
        sync(config)


def test_sync_goes_on_where_a_tracker_has_left_it(
    config: StudyConfig, client: FakeMLflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventeenth call fails, before anything is done or after all is done, until one attempt comes through."""
    monkeypatch.setattr(follow, "LAST_ATTEMPTS", 1)
    client.fail = lambda call: ("refused", "lost")[call % 2] if call % 17 == 0 else ""
    num_failures = 0
    while num_failures < 100:
        try:
            sync(config)
            break
        except TrackerUnavailable:
            num_failures += 1
    assert 1 < num_failures < 100
    assert_complete(config, client)


def test_nothing_is_sent_without_mlflow_without_runs_or_in_a_dry_run(
    config: StudyConfig, client: FakeMLflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch_sync(command(config, dry_run=True))
    assert f"points in 3 runs to {URI}" in capsys.readouterr().out
    untracked = replace(config, tracking=replace(config.tracking, mlflow=False))
    open_parent(untracked)
    close_parent(untracked, "FINISHED")
    with pytest.raises(ValueError, match="tracking.mlflow is false"):
        sync(untracked)
    assert client.calls == []
    with pytest.raises(FileNotFoundError, match="has no run folder with a record"):
        sync(StudyConfig(folder=str(tmp_path / "empty"), sizes=("configs/d6.yaml",)))


@pytest.mark.parametrize(("uri", "said"), [(URI, "#/experiments/7/runs"), ("sqlite:///runs/m.db", "mlflow ui")])
def test_the_start_is_shown_with_where_to_look(
    config: StudyConfig, client: FakeMLflow, capsys: pytest.CaptureFixture[str], uri: str, said: str
) -> None:
    open_parent(elsewhere(config, uri))
    [parent] = of_role(client, "study").values()
    assert (parent.info.status, parent.data.tags["sizes"]) == ("RUNNING", "d6 d8 d10")
    assert said in capsys.readouterr().out
