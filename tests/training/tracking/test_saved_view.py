"""The view of a study is saved once, shows all its runs on logarithmic axes, and costs a line where that fails."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from trackers import URI, FakeMLflow, connect

from training.tracking.mlflow import PARENT_TAG, StudyPage
from training.tracking.record import TrackingConfig
from training.tracking.saved_view import VIEW_TAG, address_of, saved_view

MAX_TAG = 20_000  # characters that MLflow takes as the value of an experiment's tag


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    return connect(FakeMLflow(), monkeypatch)


@pytest.fixture
def page(tmp_path: Path, client: FakeMLflow) -> StudyPage:
    page = StudyPage(tmp_path, TrackingConfig(uri=URI, experiment="scaling", study="sizes"))
    page.open(search=False)
    return page


def test_a_view_is_saved_once_and_its_address_names_it(page: StudyPage, client: FakeMLflow) -> None:
    assert address_of(page) == address_of(page)
    assert client.calls.count("set_experiment_tag") == 1
    [(name, value)] = client.experiment_tags.items()
    assert len(value) < MAX_TAG and f"viewStateShareKey={name.removeprefix(VIEW_TAG)}&" in address_of(page)
    assert address_of(page).startswith("#/experiments/7/runs?")


def test_a_view_that_cannot_be_saved_costs_a_line(
    page: StudyPage, client: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    client.fail = lambda call: "refused"
    assert address_of(page) == "#/experiments/7"
    assert capsys.readouterr().out.count("mlflow: ConnectionError") == 1


def test_the_view_shows_all_runs_below_the_study_on_logarithmic_axes() -> None:
    envelope = json.loads(saved_view("sizes", SimpleNamespace(start_time=5, run_id="abc"), "GFLOP"))
    state = json.loads(zlib.decompress(base64.b64decode(envelope.pop("state").removeprefix("deflate;"))))
    assert envelope == {"name": "sizes", "createdAt": 5, "updatedAt": 5}
    assert state["searchFilter"] == f"tags.`{PARENT_TAG}` = 'abc'" and state["runsHiddenMode"] == "SHOW_ALL"
    curves = [chart for chart in state["compareRunCharts"] if chart["type"] == "LINE"]
    axes = {(chart["xAxisKey"], chart["xAxisScaleType"], chart["scaleType"]) for chart in curves}
    assert axes == {("step", "log", "log")}
    assert [chart["metricKey"] for chart in curves[:2]] == ["curve/loss_avg", "curve/loss_last"]
    sections = {section["uuid"]: section["name"] for section in state["compareRunSections"]}
    assert all("GFLOP" in sections[chart["metricSectionId"]] for chart in curves)
