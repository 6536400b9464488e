"""What a tracker holds of a study, and a study whose pages are compared."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import command
from trackers import FakeMLflow

from launchers.setup.config_files import to_yaml
from launchers.study.config import STUDY, StudyConfig
from launchers.study.page import launch_sync
from training.laws.study_fit import Interval, LawFit, PowerLaw


def connect_to(client: FakeMLflow, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("training.tracking.mlflow_tracker", "training.tracking.mlflow_study"):
        monkeypatch.setattr(f"{module}.open_client", lambda uri: client)


def without_the_last(config: StudyConfig) -> StudyConfig:
    """The two sizes that are finished."""
    shutil.rmtree(Path(config.folder) / "d10-seed0")
    config = replace(config, sizes=config.sizes[:2])
    (Path(config.folder) / STUDY).write_text(to_yaml(config))
    return config


def sync(config: StudyConfig) -> None:
    launch_sync(command(config))


def of_role(client: FakeMLflow, role: str) -> dict[str, Any]:
    """The active runs of a role by their names."""
    return {run.info.run_name: run for run in client.active() if run.data.tags["role"] == role}


def state_of(client: FakeMLflow) -> Any:
    """All that a tracker holds; points that were drawn twice count twice."""
    drawn = {run: Counter(points) for run, points in client.points.items()}
    return copy.deepcopy((client.runs, drawn, client.artifacts, client.experiment_tags))


def a_law() -> LawFit:
    nothing = Interval(float("nan"), float("nan"))
    return LawFit(
        metric="loss_avg",
        variable="compute",
        law=PowerLaw(exponent=-0.2, scale=2.0, irreducible=4.5),
        source_of_irreducible="fitted",
        exponent_interval=nothing,
        exponent_t_interval=nothing,
        scale_interval=nothing,
        irreducible_interval=None,
        pearson=-0.99,
        r_squared=0.98,
        runs_test=0.5,
        names=(),
        x=(),
        y=(),
        residuals=(),
        sensitivity=(),
        held_out=(),
        left_out=(),
    )
