"""A study is one MLflow run above those of its sizes, and a saved view of them, whoever opens it however often."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trackers import FakeMLflow

from training.tracking.mlflow_client import OF_STUDY, PARENT_TAG, study_tags
from training.tracking.mlflow_state import read_state
from training.tracking.mlflow_study import VIEW_TAG, Facts, StudyView, colours, saved_view
from training.tracking.record import TrackingConfig

CONFIG = TrackingConfig(uri="http://tracker:5000", experiment="scaling", study="sizes")
FACTS = Facts({"depth": "6"}, {"final/loss_last": 4.5}, time=1000)
MAX_TAG = 20_000  # characters that MLflow takes as the value of an experiment's tag


@pytest.fixture
def client() -> FakeMLflow:
    return FakeMLflow()


def open_view(folder: Path, client: FakeMLflow, *, has_begun: bool = False) -> StudyView:
    view = StudyView(folder, CONFIG, make_client=lambda uri: client)
    view.open(has_begun=has_begun)
    return view


def unpacked(value: str) -> dict[str, Any]:
    return json.loads(zlib.decompress(base64.b64decode(json.loads(value)["state"].removeprefix("deflate;"))))


def test_a_study_is_one_run_that_its_folder_names(tmp_path: Path, client: FakeMLflow) -> None:
    open_view(tmp_path, client).release()
    open_view(tmp_path, client).release()
    [run] = client.active()
    assert (run.info.run_name, run.data.tags) == ("sizes", study_tags("sizes", OF_STUDY))
    assert read_state(tmp_path)["run_id"] == run.info.run_id and read_state(tmp_path)["uri"] == CONFIG.uri


def test_where_the_folder_has_forgotten_it_is_found_by_name_if_the_study_has_begun(
    tmp_path: Path, client: FakeMLflow
) -> None:
    open_view(tmp_path, client).release()
    (tmp_path / "mlflow.json").unlink()
    open_view(tmp_path, client, has_begun=True).release()
    assert len(client.active()) == 1
    (tmp_path / "mlflow.json").unlink()
    open_view(tmp_path, client, has_begun=False).release()  # another study that was given the same name
    assert len(client.active()) == 2


def test_a_deleted_run_is_made_again(tmp_path: Path, client: FakeMLflow) -> None:
    view = open_view(tmp_path, client)
    view.release()
    client.delete_run(view.run.info.run_id)
    again = open_view(tmp_path, client, has_begun=True)
    assert client.active() == [again.run] and again.run is not view.run


def test_two_processes_do_not_open_it_at_once(tmp_path: Path, client: FakeMLflow) -> None:
    first = open_view(tmp_path, client)
    with pytest.raises(BlockingIOError, match="by another process"):
        open_view(tmp_path, client)
    first.release()
    open_view(tmp_path, client).release()


def test_what_is_known_is_said_once(tmp_path: Path, client: FakeMLflow) -> None:
    child = client.create_run("7", run_name="d6", tags={})
    view = open_view(tmp_path, client)
    for _ in range(2):
        view.describe(FACTS)
        assert view.describe_child(child.info.run_id, FACTS)
        changes = client.changes()
    assert client.changes() == changes
    assert child.data.tags == {"depth": "6", PARENT_TAG: view.run.info.run_id}
    assert client.points[child.info.run_id] == client.points[view.run.info.run_id] == [("final/loss_last", 0, 4.5)]


def test_a_child_that_the_tracker_lacks_is_left_to_the_next_time(tmp_path: Path, client: FakeMLflow) -> None:
    view = open_view(tmp_path, client)
    changes = client.changes()
    assert not view.describe_child("f" * 32, FACTS) and client.changes() == changes


def test_the_status_is_set_when_it_changes(tmp_path: Path, client: FakeMLflow) -> None:
    view = open_view(tmp_path, client)
    view.set_status("RUNNING")
    assert "update_run" not in client.calls
    view.set_status("FINISHED")
    assert view.run.info.status == "FINISHED"


def test_files_lie_on_its_page(tmp_path: Path, client: FakeMLflow) -> None:
    (tmp_path / "report.md").write_text("laws")
    view = open_view(tmp_path, client)
    view.attach([tmp_path / "report.md"])
    assert client.artifacts == {(view.run.info.run_id, "report.md"): b"laws"}


def test_a_view_is_saved_once_and_its_address_names_it(tmp_path: Path, client: FakeMLflow) -> None:
    view = open_view(tmp_path, client)
    assert view.save_view() == view.save_view()
    assert client.calls.count("set_experiment_tag") == 1
    [(name, value)] = client.experiment_tags.items()
    assert f"viewStateShareKey={name.removeprefix(VIEW_TAG)}&" in view.save_view()
    assert f"#/experiments/{view.run.info.experiment_id}/runs?" in view.save_view()
    assert len(value) < MAX_TAG


def test_the_view_shows_all_runs_below_the_study_on_logarithmic_axes() -> None:
    envelope = saved_view("sizes", "abc", "GFLOP", SimpleNamespace(start_time=5))
    state = unpacked(envelope)
    assert json.loads(envelope).keys() == {"name", "createdAt", "updatedAt", "state"}
    assert state["searchFilter"] == f"tags.`{PARENT_TAG}` = 'abc'" and state["runsHiddenMode"] == "SHOW_ALL"
    curves = [chart for chart in state["compareRunCharts"] if chart["type"] == "LINE"]
    assert {(chart["xAxisKey"], chart["xAxisScaleType"], chart["scaleType"]) for chart in curves} == {
        ("step", "log", "log")
    }
    assert [chart["metricKey"] for chart in curves[:2]] == ["curve/loss_avg", "curve/loss_last"]
    sections = {section["uuid"]: section["name"] for section in state["compareRunSections"]}
    assert all("GFLOP" in sections[chart["metricSectionId"]] for chart in curves)


@pytest.mark.parametrize("number", [0, 1, 2, 6, 12, 40])
def test_sizes_have_colours_of_their_own(number: int) -> None:
    found = colours(number)
    assert len(set(found)) == number and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found)
