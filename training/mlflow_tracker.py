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
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training import seams
from training.mlflow_state import ViewState, read_state
from training.redaction import redact
from training.tracking import (
    SQLITE,
    Place,
    Record,
    RunRecord,
    TrackingConfig,
    absolute_uri,
    artifact_folder,
    database_file,
    flatten_metrics,
)

RECORD_TAG = "nextscale.record"  # on the MLflow run: whose record it shows, should mlflow.json get lost
REPLACES_TAG = "nextscale.replaces"  # on a run that was started over: the MLflow run that was deleted for it
OF_A_TRACKER = ("run_id", "experiment_id", "replaces", "train", "validation")  # in mlflow.json, beside its uri
MARK = re.compile(r"progress/(.+)_step")
MAX_METRICS, MAX_PARAMETERS = 1000, 100  # that MLflow takes in one call

Point = tuple[str, float, int, int]  # name, value, time in ms, step


class TrackerUnavailable(OSError):
    """The tracker cannot be reached, or does not take what it is sent."""


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
        self.uri = absolute_uri(config.uri)
        self.experiment = config.experiment
        self.parameters = {name: redact(str(value))[:500] for name, value in parameters.items()}
        self.record = RunRecord(folder)
        self.state = ViewState(folder)
        self.marks: dict[str, int] = {}  # the newest step of each kind of record that the tracker has
        self.run_id = ""
        self._status = ""
        self._make_client = make_client or open_client
        self._client: Any = None

    def connect(self) -> None:
        """Find the MLflow run, or make one, and ask what it has.

        Raises:
            BlockingIOError: another process is sending this run.
        """
        experiment_id = self._open()
        run = self._find(experiment_id) or self._create(experiment_id)
        self.run_id, self._status = run.info.run_id, run.info.status
        self.marks = self._marks(run)
        self.note(run_id=self.run_id, experiment_id=run.info.experiment_id)
        if run.data.tags.get(RECORD_TAG) != self._record_key():
            self._client.set_tag(self.run_id, RECORD_TAG, self._record_key())
        self._log_parameters(run)

    def send(self, records: list[Record]) -> Sent:
        """Send the records that the tracker does not have, in as few calls as they fit into."""
        marks, missing, num_known, num_new = dict(self.marks), [], 0, 0
        for record in records:
            if record["step"] > marks.get(record["kind"], -1):
                marks[record["kind"]] = record["step"]
                missing.append(record)
            else:
                num_known += len(flatten_metrics(record))
        for batch in _batches(missing):
            points = [point for record in batch for point in _points(record)]
            self._log(points)
            self.marks |= {record["kind"]: record["step"] for record in batch}
            num_new += len(points)
        return Sent(num_new, num_known)

    def count_missing(self, place: Place) -> int:
        """How many points of the records after `place` the tracker lacks."""
        records = (record for record, _ in self.record.read_after(place))
        return sum(len(flatten_metrics(item)) for item in records if item["step"] > self.marks.get(item["kind"], -1))

    def set_status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        if status == self._status:
            return
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status)
        self._status = status

    def start_over(self) -> None:
        """Delete the MLflow run. The next connection makes another one, with a tag that names this one."""
        run = self._find(self._open())
        if run is not None:
            self.state.update(replaces=run.info.run_id)  # noted first: an answer may be lost
            self._client.delete_run(run.info.run_id)
        self.state.update(run_id=None)

    def note(self, **changes: Any) -> None:
        """Note in mlflow.json which tracker this is, and more; what it says of another tracker goes."""
        if not self._is_noted():
            changes = dict.fromkeys(OF_A_TRACKER) | changes
        self.state.update(**{"uri": self.uri, "experiment": self.experiment} | changes)

    def _is_noted(self) -> bool:
        """Whether mlflow.json speaks of this tracker."""
        return self.state.values.get("uri") == self.uri

    def _open(self) -> str:
        """Claim the run and open a client; the id of the experiment."""
        self.state.claim()
        self._client = self._make_client(self.uri)
        found = self._client.get_experiment_by_name(self.experiment)
        if found:
            return found.experiment_id
        return self._client.create_experiment(self.experiment, artifact_location=artifact_folder(self.uri))

    def _find(self, experiment_id: str) -> Any:
        """The run that mlflow.json names, else one that says it shows this record; None where neither is there."""
        known = self.state.values
        if self._is_noted() and known.get("run_id"):
            run = _run_or_none(self._client, known["run_id"])
            if run is not None and run.info.lifecycle_stage == "active":
                return run
        shows_ours = f"tags.`{RECORD_TAG}` = '{self._record_key()}'"
        return next(iter(self._client.search_runs([experiment_id], shows_ours, max_results=1)), None)

    def _create(self, experiment_id: str) -> Any:
        tags = {RECORD_TAG: self._record_key()}
        if self._is_noted() and (replaced := self.state.values.get("replaces")):
            tags[REPLACES_TAG] = replaced
        name = "/".join(self.folder.absolute().parts[-2:])
        run = self._client.create_run(experiment_id, run_name=name, tags=tags)
        self.state.update(**dict.fromkeys(OF_A_TRACKER))
        return run

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


def _points(record: Record) -> list[Point]:
    """The step comes last: where one record is too large for one call, it says that all of it has arrived."""
    time, step = int(record.get("time", 0) * 1000), record["step"]
    flat = sorted(flatten_metrics(record).items(), key=lambda item: item[0] == f"progress/{record['kind']}_step")
    return [(name, value, time, step) for name, value in flat]


def _batches(records: list[Record]) -> Iterator[list[Record]]:
    """Whole records, as many at a time as MLflow takes in one call, and at least one."""
    batch: list[Record] = []
    num_points = 0
    for record in records:
        size = len(flatten_metrics(record))
        if batch and num_points + size > MAX_METRICS:
            yield batch
            batch, num_points = [], 0
        batch.append(record)
        num_points += size
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


def open_client(uri: str) -> Any:
    """A client of the tracker; a database file that is not there is made."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    file = database_file(uri)
    if file is not None and not file.exists():
        _make_database(file, MlflowClient)
    return MlflowClient(tracking_uri=uri)


def _make_database(file: Path, make_client: Callable[..., Any]) -> None:
    """A new database appears whole: MLflow takes seconds for its tables, and one cut short never works again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=".mlflow-", ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / file.name
        make_client(tracking_uri=f"{SQLITE}{draft}").search_experiments(max_results=1)
        seams.reach("mlflow.database", draft)
        try:
            os.link(draft, file)
        except FileExistsError:
            pass  # another run was first
        except OSError:
            os.rename(draft, file)  # a file system without links


def reason(error: Exception) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:120]}"


def _run_or_none(client: Any, run_id: str) -> Any:
    """The run, None if the tracker does not have it; a tracker that cannot be asked raises."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
