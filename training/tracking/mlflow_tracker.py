"""The door to MLflow: the MLflow run that shows one run folder, and what it has of its record.

Every point is there exactly once, because the tracker itself is asked how far it has come, not a note of ours: with
each record goes its step, as the metric "progress/train_step", and records go in order, whole, at most 1,000 metrics a
call, which MLflow's database takes in one transaction. So the newest value of that metric names the last record that
arrived, whoever sent it and whether or not an answer came back. Should a call that was given up be carried out late,
after it was sent again, the database still keeps one of each: equal points of equal time are one row there.

What a step measured first stays: a resumed run that takes steps again does not overwrite their points.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from training import seams
from training.tracking.curves import Point, points_of
from training.tracking.mlflow_client import (
    COMMIT_TAG,
    OF_STUDY,
    OF_TRAINING,
    PARENT_TAG,
    active_run,
    find_run,
    open_client,
    open_experiment,
    reason,
    set_status,
    set_tags,
    study_tags,
)
from training.tracking.mlflow_state import OF_A_TRACKER, ViewState, read_state
from training.tracking.record import CURVE_UNITS, Place, Record, RunRecord, TrackingConfig, absolute_uri
from training.tracking.redaction import redact

RECORD_TAG = "nextscale.record"  # on the MLflow run: whose record it shows, should mlflow.json get lost
REPLACES_TAG = "nextscale.replaces"  # on a run that was started over: the MLflow run that was deleted for it
UNIT_TAG = "curve_unit"  # on the MLflow run: of the steps of `curve/*`, which stay what they were at first
MARK = re.compile(r"progress/(.+)_step")
MAX_METRICS, MAX_PARAMETERS = 1000, 100  # that MLflow takes in one call


class TrackerUnavailable(OSError):
    """The tracker cannot be reached, or does not take what it is sent."""

    exit_code: ClassVar[int] = 69


@dataclass(frozen=True)
class Sent:
    """Numbers of points, one for each metric of each record: those sent now, and those the tracker had."""

    new: int = 0
    known: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.new + other.new, self.known + other.known)


class Tracker:
    """The MLflow run of a run folder. Nothing is caught or tried again here: what MLflow raises comes out.

    MLflow's parameters cannot change: one with which a run is started again stands in the tag "changed/NAME".
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        parameters: dict[str, Any],
        *,
        make_client: Callable[[str], Any] | None = None,
    ) -> None:
        self.folder = folder
        self.config = replace(config, uri=absolute_uri(config.uri))
        self.parameters = {name: redact(str(value))[:500] for name, value in parameters.items()}
        self.record = RunRecord(folder)
        self.state = ViewState(folder)
        self.marks: dict[str, int] = {}  # the newest step of each kind of record that the tracker has
        self.run_id = ""
        self._status = ""
        self._make_client = make_client or open_client
        self._client: Any = None

    @property
    def uri(self) -> str:
        """Of the tracker, a database file with its whole path."""
        return self.config.uri

    def connect(self) -> None:
        """Find the MLflow run, or make one, and ask what it has.

        Raises:
            BlockingIOError: another process is sending this run.
        """
        experiment_id = self._open()
        run = self._find(experiment_id) or self._create(experiment_id)
        self.run_id, self._status = run.info.run_id, run.info.status
        if run.data.tags.get(UNIT_TAG) in CURVE_UNITS:
            self.config = replace(self.config, curve_unit=run.data.tags[UNIT_TAG])
        self.marks = self._marks(run)
        self.note(run_id=self.run_id, experiment_id=run.info.experiment_id)
        set_tags(self._client, run, self._tags(experiment_id))
        self._log_parameters(run)

    def send(self, records: list[Record]) -> Sent:
        """Send the records that the tracker does not have, in as few calls as they fit into."""
        marks, missing, num_known = dict(self.marks), [], 0
        for record, points in ((record, points_of(record, self.config)) for record in records):
            if not points or record["step"] <= marks.get(record["kind"], -1):
                num_known += len(points)
                continue
            marks[record["kind"]] = record["step"]
            missing.append((record, points))
        for batch in _batches(missing):
            self._log([point for _, points in batch for point in points])
            self.marks |= {record["kind"]: record["step"] for record, _ in batch}
        return Sent(sum(len(points) for _, points in missing), num_known)

    def count_missing(self, place: Place) -> int:
        """How many points of the records after `place` the tracker lacks."""
        records = (record for record, _ in self.record.read_after(place))
        missing = (record for record in records if record["step"] > self.marks.get(record["kind"], -1))
        return sum(len(points_of(record, self.config)) for record in missing)

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        if status == self._status:
            return
        set_status(self._client, self.run_id, status)
        self._status = status

    def start_over(self) -> None:
        """Delete the MLflow run. The next connection makes another one, with a tag that names this one."""
        run = self._find(self._open())
        if run is not None:
            self.state.update(replaces=run.info.run_id)  # noted first: an answer may be lost
            self._client.delete_run(run.info.run_id)
        self.state.update(run_id=None)

    def note(self, **changes: Any) -> None:
        """Note in mlflow.json which tracker this is, and more."""
        self.state.note(self.uri, self.config.experiment, **changes)

    def _is_noted(self) -> bool:
        """Whether mlflow.json speaks of this tracker."""
        return self.state.is_of(self.uri)

    def _open(self) -> str:
        """Claim the run and open a client; the id of the experiment."""
        self.state.claim()
        self._client = self._make_client(self.uri)
        return open_experiment(self._client, self.config.experiment, self.uri)

    def _find(self, experiment_id: str) -> Any:
        """The run that mlflow.json names, else one that says it shows this record; None where neither is there."""
        noted = self.state.values.get("run_id") if self._is_noted() else None
        return active_run(self._client, noted) or find_run(
            self._client, experiment_id, {RECORD_TAG: self._record_key()}
        )

    def _create(self, experiment_id: str) -> Any:
        tags = {RECORD_TAG: self._record_key(), UNIT_TAG: self.config.curve_unit}
        if self._is_noted() and (replaced := self.state.values.get("replaces")):
            tags[REPLACES_TAG] = replaced
        name = self.folder.name if self.config.study else "/".join(self.folder.absolute().parts[-2:])
        run = self._client.create_run(experiment_id, run_name=name, tags=tags)
        self.state.update(**dict.fromkeys(OF_A_TRACKER))
        return run

    def _tags(self, experiment_id: str) -> dict[str, str]:
        """What says of the run whose record it shows, which code has written it, and which study it belongs to."""
        tags = {RECORD_TAG: self._record_key()}
        if commit := self.state.values.get("git"):
            tags[COMMIT_TAG] = commit
        if not self.config.study:
            return tags
        tags |= study_tags(self.config.study, OF_TRAINING)
        parent = find_run(self._client, experiment_id, study_tags(self.config.study, OF_STUDY))
        return tags | ({PARENT_TAG: parent.info.run_id} if parent else {})

    def _record_key(self) -> str:
        """What tells this record from all others: its first entry, which holds a time."""
        first = [record for record, _ in islice(self.record.read_after(), 1)]
        return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:32]

    def _marks(self, run: Any) -> dict[str, int]:
        found = {match[1]: int(step) for name, step in run.data.metrics.items() if (match := MARK.fullmatch(name))}
        known = self.state.values
        if not self._is_noted() or known.get("run_id") != self.run_id:
            return found
        return {kind: known[kind] for kind in ("train", "validation") if kind in known} | found

    def _log_parameters(self, run: Any) -> None:
        from mlflow.entities import Param

        known, tags = run.data.params, run.data.tags
        unknown = [Param(name, value) for name, value in self.parameters.items() if name not in known]
        for first in range(0, len(unknown), MAX_PARAMETERS):
            self._client.log_batch(self.run_id, params=unknown[first : first + MAX_PARAMETERS])
        for name, value in self.parameters.items():
            if name in known and tags.get(f"changed/{name}", known[name]) != value:
                self._client.set_tag(self.run_id, f"changed/{name}", value)

    def _log(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        for first in range(0, len(points), MAX_METRICS):
            metrics = [Metric(*point) for point in points[first : first + MAX_METRICS]]
            seams.reach("mlflow.send", metrics)
            self._client.log_batch(self.run_id, metrics=metrics)
            seams.reach("mlflow.sent", metrics)


def _batches(records: list[tuple[Record, list[Point]]]) -> Iterator[list[tuple[Record, list[Point]]]]:
    """Whole records, as many at a time as MLflow takes in one call, and at least one."""
    batch: list[tuple[Record, list[Point]]] = []
    num_points = 0
    for record, points in records:
        if batch and num_points + len(points) > MAX_METRICS:
            yield batch
            batch, num_points = [], 0
        batch.append((record, points))
        num_points += len(points)
    if batch:
        yield batch


def log_picture(run: str | Path, picture: Path, *, group: str = "") -> None:
    """Put a picture on the page of the run's MLflow run, under "pictures/group"; says in one line if that cannot be.

    The MLflow run is the one that `run`/mlflow.json names. What was not trained here has none, of which nothing is
    said. Nothing is raised: the picture itself is on disk.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; unlike the curves, a picture is waited for
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        state = read_state(Path(run))
        if state is None:
            if RunRecord.exists(Path(run)):
                print(f"mlflow: {run} has no mlflow.json, so {picture} is on disk only", flush=True)
            return
        if not (state.get("uri") and state.get("run_id")):
            print(f"mlflow: {run}/mlflow.json names no MLflow run, so {picture} is on disk only", flush=True)
            return
        place = "/".join(filter(None, ("pictures", group)))
        open_client(state["uri"]).log_artifact(state["run_id"], str(picture), artifact_path=place)
    except Exception as error:  # whatever a tracker throws must not reach the caller: the picture is on disk
        print(f"mlflow: {reason(error)}; {picture} is on disk only", flush=True)
