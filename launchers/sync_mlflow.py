"""Send to MLflow what it lacks of a run: after an outage, to another tracker, or because its page was deleted.

`python launchers/sync_mlflow.py runs/d16`, and `--uri http://HOST:5000` for another tracker than the run's own. A run
that the tracker does not know is made there. What is there already is not sent again: doing it twice changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from launchers.setup.config_files import read_settings
from training.tracking.curves import points_of
from training.tracking.mlflow_state import read_state
from training.tracking.mlflow_tracker import Tracker
from training.tracking.mlflow_uploader import QUIET_AND_QUICK, how_it_ended, send_now
from training.tracking.record import RunRecord, TrackingConfig, absolute_uri

OF_THE_RUN = ("uri", "experiment", "every", "curve_unit", "study")  # settings


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """The settings of a sync: which run, and which tracker instead of the run's own."""

    run: str = field(metadata={"is_bare": True})
    uri: str = ""  # of the tracker; empty: the one that the run's mlflow.json names, else that of its config.yaml
    experiment: str = ""  # empty: likewise


def launch(command: Command[SyncConfig]) -> None:
    """Raises: FileNotFoundError: no record there. BlockingIOError: the run is at it. TrackerUnavailable."""
    refuse_several_ranks("sync_mlflow.py")
    folder = Path(command.config.run)
    if not RunRecord.exists(folder):
        raise FileNotFoundError(f"{folder}: has no metrics.jsonl; name the folder of a training run")
    records = RunRecord(folder).read()
    if not records:
        say(f"{folder}: nothing is recorded yet, nothing to do")
        return
    settings = read_settings(folder / "config.yaml")
    tracking = where_to(command.config, read_state(folder) or {}, settings)
    if command.dry_run:
        number = sum(len(points_of(record, tracking)) for record in records)
        say(f"{folder}: would send what is missing of {number} points to {tracking.uri}")
        return
    os.environ.update(QUIET_AND_QUICK | os.environ)
    tracker = Tracker(folder, tracking, settings)
    sent = send_now(tracker, how_it_ended(read_state(folder) or {}, records, settings))
    page = page_of(tracker.uri, read_state(folder) or {})
    say(f"{folder}: {sent.new} points sent, {sent.known} were there already; {page}")


def where_to(config: SyncConfig, state: dict[str, Any], settings: dict[str, Any]) -> TrackingConfig:
    """The tracker: the one asked for, else the one that the run was last sent to, else the one of its settings."""
    known = {name: settings[f"tracking.{name}"] for name in OF_THE_RUN if f"tracking.{name}" in settings}
    if uri := config.uri or state.get("uri"):
        known["uri"] = uri
    if experiment := config.experiment or state.get("experiment"):
        known["experiment"] = experiment
    return TrackingConfig(**known | {"uri": absolute_uri(known.get("uri", TrackingConfig.uri))})


def page_of(uri: str, state: dict[str, Any]) -> str:
    """Where to look at it."""
    place = f"#/experiments/{state.get('experiment_id')}/runs/{state.get('run_id')}"
    return f"{uri.rstrip('/')}/{place}" if uri.startswith("http") else f"run {state.get('run_id')} in {uri}"


def main() -> None:
    run_launcher(SyncConfig, launch, __doc__)


if __name__ == "__main__":
    main()
