"""Send to MLflow what it lacks of a run: after an outage, to another tracker, or because its page was deleted.

`python launchers/sync_mlflow.py runs/d16`, and `--uri http://HOST:5000` for a server, also for the run's own. A run
that the tracker does not know is made there. What is there already is not sent again: doing it twice changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from launchers.setup.config_files import read_settings
from training.tracking.curves import points_of
from training.tracking.follow import send
from training.tracking.mlflow import RunPage, how_it_ended, read_state
from training.tracking.record import ENVIRONMENT_URI, RunRecord, TrackingConfig, absolute_uri, database_file

OF_THE_RUN = ("uri", "experiment", "every", "curve_unit", "study")  # settings


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """The settings of a sync: which run, and which tracker instead of the run's own."""

    run: str = field(metadata={"is_bare": True})
    uri: str = ""  # of the tracker; empty: the database file that the run names, or MLFLOW_TRACKING_URI
    experiment: str = ""  # empty: likewise


def launch(command: Command[SyncConfig]) -> None:
    """Send to MLflow what it lacks of a run, and report how much that was.

    Raises:
        FileNotFoundError: the folder has no record.
        BlockingIOError: another process is sending this run, as the run itself does.
        TrackerUnavailable: the tracker cannot be reached, or does not take it.
    """
    refuse_several_ranks("sync_mlflow.py")
    folder = Path(command.config.run)
    if not RunRecord.exists(folder):
        raise FileNotFoundError(f"{folder}: has no metrics.jsonl; name the folder of a training run")
    settings = read_settings(folder / "config.yaml")
    tracking = where_to(command.config, read_state(folder), settings)
    num_points = sum(len(points_of(record, tracking)) for record in RunRecord(folder).read())
    if num_points == 0:
        say(f"{folder}: nothing is recorded yet, nothing to do")
    elif command.dry_run:
        say(f"{folder}: would send what is missing of {num_points} points to {tracking.uri}")
    else:
        num_sent = send(RunPage(folder, tracking, settings), how_it_ended(folder, settings))
        page = page_of(tracking.uri, read_state(folder))
        say(f"{folder}: {num_sent} points sent, {num_points - num_sent} were there already; {page}")


def where_to(config: SyncConfig, state: Mapping[str, str], settings: Mapping[str, Any]) -> TrackingConfig:
    """Return the tracker that is asked for, else the one that the run was last sent to, else that of its settings."""
    known = {name: settings[f"tracking.{name}"] for name in OF_THE_RUN if f"tracking.{name}" in settings}
    for name, asked in (("uri", config.uri), ("experiment", config.experiment)):
        if value := asked or state.get(name):
            known[name] = value
    tracking = TrackingConfig(**known)
    if not config.uri and database_file(tracking.uri) is None and tracking.uri != os.environ.get(ENVIRONMENT_URI):
        raise ValueError(
            f"{config.run} names the tracker {tracking.uri}; a folder of somebody else could send your token anywhere, "
            f"so say that you trust it: add --uri {tracking.uri}"
        )
    return replace(tracking, uri=absolute_uri(tracking.uri))


def page_of(uri: str, state: Mapping[str, str]) -> str:
    """Return where to look at the run."""
    if not uri.startswith("http"):
        return f"run {state.get('run_id')} in {uri}"
    return f"{uri.rstrip('/')}/#/experiments/{state.get('experiment_id')}/runs/{state.get('run_id')}"


def main() -> None:
    run_launcher(SyncConfig, launch, __doc__)


if __name__ == "__main__":
    main()
