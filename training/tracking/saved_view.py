"""The form in which MLflow's own pages save a view of an experiment: charts of a study, losses against compute.

MLflow does not document it; this is what the pages of MLflow 3 write and read. A page that does not know it shows its
usual charts. Nothing but the address of a page depends on it.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from training.tracking.mlflow import PARENT_TAG, StudyPage, reason

VIEW_TAG = "mlflow.sharedViewState."  # of an experiment, with the key of the view behind it
COLOUR_TAG = "mlflow.runColor"  # of a run's curves
SIZE = "final/n_billion"  # a metric: parameters, all of them, in billions
COLUMNS = ("final/loss_last", "final/loss_avg", SIZE)
LOSSES, ERRORS = ("loss_avg", "loss_last"), ("error_avg", "error_last")
OTHER_SECTIONS = ("curve", "final", "loss", "progress", "quality", "speed", "scales")


def address_of(page: StudyPage) -> str:
    """Save the view of a study's runs, and return where MLflow shows it, or the experiment if that fails."""
    info = page.run.info
    experiment = f"#/experiments/{info.experiment_id}"
    key = f"study-{info.run_id[:12]}"
    try:
        value = saved_view(f"{page.config.study}: loss against compute", info, page.config.curve_unit)
        if page.client.get_experiment(info.experiment_id).tags.get(VIEW_TAG + key) != value:
            page.client.set_experiment_tag(info.experiment_id, VIEW_TAG + key, value)
    except Exception as error:  # whatever a tracker throws at a tag of its own
        print(f"mlflow: {reason(error)}; the view of the study is not saved", flush=True)
        return experiment
    return f"{experiment}/runs?viewStateShareKey={key}&compareRunsMode=CHART&workflowType=machine_learning"


def saved_view(name: str, parent: Any, unit: str) -> str:
    """Compose the view: charts of the runs below `parent`, the info of an MLflow run, with losses on log axes.

    unit: of compute, the steps of `curve/*`.
    """
    # the pages name the axis "Step" and leave the titles of charts out: only the section can say the unit
    section = {"uuid": "loss-against-compute", "name": f"Loss against {unit} (Step)", "display": True}
    section |= {"isReordered": False, "columns": 2, "cardHeight": 420}
    others = [
        {"uuid": f"section-{other}", "name": other, "display": False, "isReordered": False} for other in OTHER_SECTIONS
    ]
    charts = [_curve_chart(metric, unit) for metric in LOSSES]
    charts += [_scatter_chart(metric) for metric in LOSSES]
    charts += [_curve_chart(metric, unit) for metric in ERRORS]
    chart = {"metricSectionId": section["uuid"], "runsCountToCompare": 100, "deleted": False, "isGenerated": False}
    state = {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{parent.run_id}'",
        "orderByKey": f"metrics.`{SIZE}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"metrics.`{column}`" for column in COLUMNS],
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [chart | each for each in charts],
        "compareRunSections": [section, *others],
        "isAccordionReordered": True,  # ours stays the first
        "hideEmptyCharts": True,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    times = {"createdAt": parent.start_time, "updatedAt": parent.start_time}
    return json.dumps({"name": name, **times, "state": f"deflate;{packed}"})


def _curve_chart(metric: str, unit: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": f"curve-{metric}",
        "displayName": f"{metric} against compute in {unit}",
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


def _scatter_chart(metric: str) -> dict[str, Any]:
    return {
        "type": "SCATTER",
        "uuid": f"scatter-{metric}",
        "displayName": f"{metric} against billions of parameters",
        "xaxis": {"key": SIZE, "type": "METRIC"},
        "yaxis": {"key": f"final/{metric}", "type": "METRIC"},
    }
