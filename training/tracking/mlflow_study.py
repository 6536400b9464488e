"""A scaling study in MLflow: the run above the runs of its sizes, and a saved view of their losses against compute.

As everywhere, the folders are the record and MLflow is a view of them: all that is here can be done again, and doing it
twice changes nothing. What MLflow raises comes out.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.tracking.mlflow_client import (
    OF_STUDY,
    PARENT_TAG,
    active_run,
    find_run,
    open_client,
    open_experiment,
    set_status,
    set_tags,
    study_tags,
)
from training.tracking.mlflow_state import ViewState
from training.tracking.record import TrackingConfig, absolute_uri

VIEW_TAG = "mlflow.sharedViewState."  # of an experiment, with the view's key behind it: how MLflow's pages save views
COLOUR_TAG = "mlflow.runColor"  # of a run's curves on MLflow's pages
COLOURS = ((43, 45, 127), (30, 110, 165), (35, 155, 135), (130, 185, 60), (245, 175, 40), (225, 85, 45))
SIZE = "final/n_billion"  # a metric: parameters, all of them, in billions
COLUMNS = ("final/loss_last", "final/loss_avg", SIZE)
LOSSES, ERRORS = ("loss_avg", "loss_last"), ("error_avg", "error_last")


@dataclass(frozen=True)
class Facts:
    """What is known of a run besides its record."""

    tags: Mapping[str, str]
    scalars: Mapping[str, float]
    time: int  # of the scalars, ms


class StudyView:
    """The MLflow run of a study's folder. Open it before anything else, and release it at the end."""

    def __init__(
        self, folder: Path, config: TrackingConfig, *, make_client: Callable[[str], Any] | None = None
    ) -> None:
        """`config.study` is the study's name."""
        self.folder = folder
        self.config = replace(config, uri=absolute_uri(config.uri))
        self.state = ViewState(folder)
        self.run: Any = None
        self._make_client = make_client or open_client
        self._client: Any = None

    def open(self, *, has_begun: bool) -> None:
        """Find the MLflow run, or make one; `has_begun`: some of the study's runs have, so that it may be there.

        Raises:
            BlockingIOError: another process is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state.claim()
        self._client = self._make_client(self.config.uri)
        experiment_id = open_experiment(self._client, self.config.experiment, self.config.uri)
        noted = self.state.values.get("run_id") if self.state.is_of(self.config.uri) else None
        tags = study_tags(self.config.study, OF_STUDY)
        self.run = active_run(self._client, noted)
        if self.run is None and has_begun:
            self.run = find_run(self._client, experiment_id, tags)
        if self.run is None:
            self.run = self._client.create_run(experiment_id, run_name=self.config.study, tags=tags)
        set_tags(self._client, self.run, tags)
        self.state.note(
            self.config.uri,
            self.config.experiment,
            run_id=self.run.info.run_id,
            experiment_id=self.run.info.experiment_id,
        )

    def release(self) -> None:
        """Let other processes show the study."""
        self.state.release()

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        if self.run.info.status != status:
            set_status(self._client, self.run.info.run_id, status)

    def describe(self, facts: Facts) -> None:
        """Tags and numbers of the study itself."""
        self._describe(self.run, facts)

    def describe_child(self, run_id: str, facts: Facts) -> bool:
        """Put an MLflow run below the study's, and say of it what is known; whether the tracker has it."""
        child = active_run(self._client, run_id)
        if child is None:
            return False
        parent = {PARENT_TAG: self.run.info.run_id}
        self._describe(child, replace(facts, tags={**facts.tags, **parent}))
        return True

    def attach(self, files: Sequence[Path]) -> None:
        """Put files on the study's page; one of the same name is replaced."""
        for file in files:
            self._client.log_artifact(self.run.info.run_id, str(file))

    def save_view(self) -> str:
        """Save the view "loss against compute" of the study's runs in its experiment; the address within MLflow."""
        info = self.run.info
        key = f"study-{info.run_id[:12]}"
        value = saved_view(f"{self.config.study}: loss against compute", info.run_id, self.config.curve_unit, info)
        experiment = self._client.get_experiment(info.experiment_id)
        if experiment.tags.get(VIEW_TAG + key) != value:
            self._client.set_experiment_tag(info.experiment_id, VIEW_TAG + key, value)
        view = f"viewStateShareKey={key}&compareRunsMode=CHART&workflowType=machine_learning"
        return f"#/experiments/{info.experiment_id}/runs?{view}"

    def _describe(self, run: Any, facts: Facts) -> None:
        set_tags(self._client, run, dict(facts.tags))
        for name, value in facts.scalars.items():
            if run.data.metrics.get(name) != value:
                # at step 0: MLflow draws numbers of other steps as curves
                self._client.log_metric(run.info.run_id, name, value, timestamp=facts.time, step=0)


def colours(number: int) -> list[str]:
    """So many colours in the order of a rainbow, as #rrggbb: a size's place in it tells how large it is."""
    last = len(COLOURS) - 1
    places = [index * last / max(number - 1, 1) for index in range(number)]
    found = []
    for place in places:
        below = min(int(place), last - 1)
        pairs = zip(COLOURS[below], COLOURS[below + 1], strict=True)
        found.append("#" + "".join(f"{round(low + (high - low) * (place - below)):02x}" for low, high in pairs))
    return found


def saved_view(name: str, parent_id: str, unit: str, info: Any) -> str:
    """A view as the pages of MLflow 3 save it: charts of the runs below `parent_id`, losses and compute on log axes.

    The form is MLflow's own and not documented; a page that does not know it shows its usual charts.
    """
    # the pages name the axis "Step" and leave the titles of charts out: only here can the unit be said
    section = {"uuid": "loss-against-compute", "name": f"Loss against {unit} (Step)", "display": True}
    section |= {"isReordered": False, "columns": 2, "cardHeight": 420}
    others = [
        {"uuid": f"section-{other}", "name": other, "display": False, "isReordered": False}
        for other in ("curve", "final", "loss", "progress", "quality", "speed", "scales")
    ]
    charts = [_curve_chart(metric, unit, section["uuid"]) for metric in LOSSES]
    charts += [_scatter_chart(metric, section["uuid"]) for metric in LOSSES]
    charts += [_curve_chart(metric, unit, section["uuid"]) for metric in ERRORS]
    state = {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{parent_id}'",
        "orderByKey": f"metrics.`{SIZE}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"metrics.`{column}`" for column in COLUMNS],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [section, *others],
        "isAccordionReordered": True,  # ours stays the first
        "hideEmptyCharts": True,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    envelope = {"name": name, "createdAt": info.start_time, "updatedAt": info.start_time, "state": f"deflate;{packed}"}
    return json.dumps(envelope)


def _curve_chart(metric: str, unit: str, section: str) -> dict[str, Any]:
    return {
        **_chart("LINE", f"{metric} against compute in {unit}", f"curve-{metric}", section),
        "metricKey": f"curve/{metric}",
        "selectedMetricKeys": [f"curve/{metric}"],
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "xAxisScaleType": "log",
        "scaleType": "log",
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": False,
        "lineSmoothness": 0,
        "displayPoints": True,
        "ignoreOutliers": False,
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
    }


def _scatter_chart(metric: str, section: str) -> dict[str, Any]:
    return {
        **_chart("SCATTER", f"{metric} against billions of parameters", f"scatter-{metric}", section),
        "xaxis": {"key": SIZE, "type": "METRIC"},
        "yaxis": {"key": f"final/{metric}", "type": "METRIC"},
    }


def _chart(kind: str, title: str, uuid: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": uuid,
        "displayName": title,
        "metricSectionId": section,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
