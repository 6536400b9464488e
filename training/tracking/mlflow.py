"""The door to MLflow: one MLflow run for each run folder, one above them for a study, and pictures beside the curves.

Written by hand because MLflow's own client waits for a tracker that is away, and cannot say what it has already sent.
Here every point of a record arrives exactly once, since the tracker itself is asked how far it has come. With each
record goes its step, as the metric "progress/train_step"; records go in order and whole, at most 1,000 metrics a call,
which MLflow's database takes in one transaction. So the newest value of that metric names the last record that has
arrived, whoever sent it. A call that was given up and is carried out late does no harm: MLflow's database keeps equal
points of equal time once.

Nothing is tried again here: what MLflow raises comes out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.json_lines import BEGINNING
from data_pipeline.files.locks import take_lock
from data_pipeline.files.strict_json import read_json
from training.tracking.curves import Point, points_of
from training.tracking.record import (
    CURVE_UNITS,
    Record,
    RunRecord,
    TrackingConfig,
    absolute_uri,
    artifact_folder,
    database_file,
    database_uri,
)
from training.tracking.redaction import redact

STATE, LOCK, START_OVER = "mlflow.json", "mlflow.lock", "mlflow.start_over"  # files of a run folder
OF_A_TRACKER = ("run_id", "experiment_id", "replaces", "copied_from")  # values in mlflow.json of one tracker
ENDED = ("FINISHED", "FAILED", "KILLED")
# tags of MLflow runs
RECORD_TAG = "nextscale.record"  # whose record it shows, should mlflow.json get lost
COPIED_TAG = "nextscale.copied_from"  # of a run whose folder is a copy: the MLflow run of the original
REPLACES_TAG = "nextscale.replaces"  # of a run that was started over: the MLflow run that was deleted for it
UNIT_TAG = "curve_unit"  # of the steps of `curve/*`, which stay what they were at first
STUDY_TAG, ROLE_TAG = "study", "role"  # the name of the study, and what the run is in it
OF_STUDY, OF_TRAINING = "study", "train"  # roles
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow shows runs as children
COMMIT_TAG = "mlflow.source.git.commit"
MARK = re.compile(r"progress/(.+)_step")
SLICE = 50  # records read at a time
MAX_METRICS, MAX_PARAMETERS = 1000, 100  # that MLflow takes in one call
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # attempts are repeated by who sends
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TrackerUnavailable(OSError):
    """The tracker cannot be reached, or does not take what it is sent."""

    exit_code: ClassVar[int] = 69


def unavailable(page: Page, error: Exception) -> TrackerUnavailable:
    """Return the one error for whatever a tracker has thrown."""
    return TrackerUnavailable(f"{page.config.uri}: {reason(error)}; send it again when the tracker is back")


class Page:
    """The MLflow run that shows a folder, and the folder's own note of it, mlflow.json.

    The note holds `uri` and `experiment` of the tracker, `run_id` and `experiment_id` of the MLflow run, the `place`
    that it was written for, the `status` of what is shown (RUNNING, FINISHED, FAILED or KILLED) and, as `git`, the
    commit of the code. It may get lost. People copy folders, and the note with them: `copied_from` is then the MLflow
    run of the original.
    """

    def __init__(self, folder: Path, config: TrackingConfig) -> None:
        self.folder = folder
        self.config = replace(config, uri=absolute_uri(config.uri))
        self.client: Any = None
        self.run: Any = None  # as MLflow described it when it was opened
        self._experiment_id = ""
        self._status = ""
        self._lock: int | None = None

    def claim(self) -> None:
        """Keep other processes from sending this folder until `release`, or until this process ends.

        On a file system without locks nobody is kept from it; equal points are then kept once by MLflow's database.

        Raises:
            BlockingIOError: another process is sending it.
        """
        if self._lock is None:
            self._lock = take_lock(self.folder / LOCK)
        if self._lock is None:
            raise BlockingIOError(f"{self.folder} is being sent by another process; wait for it, or stop it")

    def release(self) -> None:
        """Let other processes send this folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def note(self, **changes: str | None) -> None:
        """Note in mlflow.json which tracker this is, and more; None takes a value away."""
        if self._noted() is None:
            changes = dict.fromkeys(OF_A_TRACKER) | changes
        update_state(self.folder, uri=self.config.uri, experiment=self.config.experiment, **changes)

    def set_status(self, status: str) -> None:
        """Give the MLflow run a status: RUNNING, FINISHED, FAILED or KILLED."""
        if status == self._status:
            return
        if status == "RUNNING":
            self.client.update_run(self.run.info.run_id, status=status)
        else:
            self.client.set_terminated(self.run.info.run_id, status)
        self._status = status

    def _noted(self) -> dict[str, str] | None:
        """Return what mlflow.json says of this tracker; None if it speaks of another, or is not there."""
        state = read_state(self.folder)
        return state if state.get("uri") == self.config.uri else None

    def _connect(self) -> None:
        """Claim the folder, and find the experiment or make it."""
        self.claim()
        self.client = open_client(self.config.uri)
        name = self.config.experiment
        found = self.client.get_experiment_by_name(name)
        if found:
            self._experiment_id = found.experiment_id
        else:
            place = artifact_folder(self.config.uri)
            self._experiment_id = self.client.create_experiment(name, artifact_location=place)

    def _leave_the_original(self) -> None:
        """Take leave of the MLflow run that the note names, if the note came here by copying the folder.

        It did if the folder that it was written for is still there and shows the same MLflow run. A folder that was
        moved keeps its MLflow run.
        """
        noted = self._noted() or {}
        original, run_id = Path(noted.get("place") or self.folder), noted.get("run_id")
        if not run_id or not original.is_dir() or original.samefile(self.folder):
            return
        if read_state(original).get("run_id") == run_id:
            self.note(run_id=None, experiment_id=None, replaces=None, copied_from=run_id, place=None)

    def _find(self, tags: Mapping[str, str], *, search: bool = True) -> Any:
        """Find the MLflow run that mlflow.json names, else one with these tags; None where there is neither."""
        noted = (self._noted() or {}).get("run_id")
        found = _active_run(self.client, noted) if noted else None
        return found or (self._search(tags) if search else None)

    def _search(self, tags: Mapping[str, str]) -> Any:
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        return next(iter(self.client.search_runs([self._experiment_id], wanted, max_results=1)), None)

    def _take(self, run: Any) -> None:
        """Let this be the MLflow run, and note it."""
        self.run, self._status = run, run.info.status
        self.note(
            run_id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            replaces=None,
            place=str(self.folder.absolute()),
        )

    def _set_tags(self, run: Any, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            if run.data.tags.get(name) != value:
                self.client.set_tag(run.info.run_id, name, value)


class RunPage(Page):
    """The MLflow run of a training run: its record as curves, its settings as parameters.

    MLflow's parameters cannot change: one with which a run is started again stands in the tag "changed/NAME". What a
    step measured first stays: a resumed run that takes steps again does not overwrite their points, unless the file
    mlflow.start_over in the run folder asks for a fresh MLflow run.
    """

    def __init__(self, folder: Path, config: TrackingConfig, parameters: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self.parameters = {name: redact(str(value))[:500] for name, value in parameters.items()}
        self.record = RunRecord(folder)
        self.num_sent = 0  # points, so far
        self._marks: dict[str, int] = {}  # the newest step of each kind of record that the tracker has
        self._place = BEGINNING  # the tracker has all that lies before
        self._is_open = False

    def catch_up(self, status: str) -> None:
        """Send what the tracker lacks of the record, and set the status of the MLflow run.

        After an error the next call goes on where this one failed. A record without an entry has no MLflow run.

        Raises:
            BlockingIOError: another process is sending this run.
            Exception: whatever MLflow raises.
        """
        try:
            if not self._is_open or (self.folder / START_OVER).exists():
                if next(self.record.read_after(), None) is None:
                    return
                self._open()
            while news := list(islice(self.record.read_after(self._place), SLICE)):
                self._send([record for record, _ in news])
                self._place = news[-1][1]
            self.set_status(status)
        except Exception:
            self._is_open = False  # whether the last call arrived, the tracker must tell
            raise

    def _open(self) -> None:
        """Find the MLflow run, or make it, and ask what it has."""
        self._connect()
        self._leave_the_original()
        run = self._find({RECORD_TAG: self._record_key()})
        if (self.folder / START_OVER).exists():
            if run is not None:
                self.note(replaces=run.info.run_id)  # noted first: the answer may be lost
                self.client.delete_run(run.info.run_id)
                run = None
            self.note(run_id=None)
            (self.folder / START_OVER).unlink()
        known_id = self.run.info.run_id if self.run else None
        self._take(run or self._make())
        if self.run.data.tags.get(UNIT_TAG) in CURVE_UNITS:
            self.config = replace(self.config, curve_unit=self.run.data.tags[UNIT_TAG])
        sent, self._marks = self._marks, _marks_of(self.run)
        if self.run.info.run_id != known_id or any(self._marks.get(kind, -1) < step for kind, step in sent.items()):
            self._place = BEGINNING
        self._set_tags(self.run, self._tags())
        self._log_parameters()
        self._is_open = True

    def _make(self) -> Any:
        tags = {RECORD_TAG: self._record_key(), UNIT_TAG: self.config.curve_unit}
        noted = self._noted() or {}
        of_notes = {REPLACES_TAG: noted.get("replaces"), COPIED_TAG: noted.get("copied_from")}
        tags |= {tag: value for tag, value in of_notes.items() if value}
        name = self.folder.name if self.config.study else "/".join(self.folder.absolute().parts[-2:])
        return self.client.create_run(self._experiment_id, run_name=name, tags=tags)

    def _tags(self) -> dict[str, str]:
        """Say whose record the run shows, which code has written it, and which study it belongs to."""
        tags = {RECORD_TAG: self._record_key()}
        if commit := read_state(self.folder).get("git"):
            tags[COMMIT_TAG] = commit
        if self.config.study:
            tags |= {STUDY_TAG: self.config.study, ROLE_TAG: OF_TRAINING}
            if parent := self._search({STUDY_TAG: self.config.study, ROLE_TAG: OF_STUDY}):
                tags[PARENT_TAG] = parent.info.run_id
        return tags

    def _record_key(self) -> str:
        """Tell this record from all others by its first entry, which holds a time; that of a copy by its origin too."""
        first = [record for record, _ in islice(self.record.read_after(), 1)]
        key = hashlib.sha256(json.dumps(first).encode()).hexdigest()[:32]
        origin = (self._noted() or {}).get("copied_from")
        return f"{key}-copy-of-{origin}" if origin else key

    def _log_parameters(self) -> None:
        from mlflow.entities import Param

        known, tags = self.run.data.params, self.run.data.tags
        unknown = [Param(name, value) for name, value in self.parameters.items() if name not in known]
        for first in range(0, len(unknown), MAX_PARAMETERS):
            self.client.log_batch(self.run.info.run_id, params=unknown[first : first + MAX_PARAMETERS])
        for name, value in self.parameters.items():
            if name in known and tags.get(f"changed/{name}", known[name]) != value:
                self.client.set_tag(self.run.info.run_id, f"changed/{name}", value)

    def _send(self, records: list[Record]) -> None:
        """Send the records that the tracker lacks, as many whole ones in a call as fit."""
        points: list[Point] = []
        marks = dict(self._marks)
        for record in records:
            more = points_of(record, self.config)
            if not more or record["step"] <= marks.get(record["kind"], -1):
                continue
            if points and len(points) + len(more) > MAX_METRICS:
                self._log(points, marks)
                points = []
            points += more
            marks[record["kind"]] = record["step"]
        if points:
            self._log(points, marks)

    def _log(self, points: list[Point], marks: dict[str, int]) -> None:
        """Send points, after which the tracker is at `marks`; a record of more than 1,000 goes in several calls."""
        for first in range(0, len(points), MAX_METRICS):
            _log_points(self.client, self.run.info.run_id, points[first : first + MAX_METRICS])
        self._marks = dict(marks)
        self.num_sent += len(points)


class StudyPage(Page):
    """The MLflow run of a study's folder, above those of its sizes and seeds. `config.study` is the study's name."""

    def open(self, *, search: bool) -> None:
        """Find the MLflow run, or make it.

        search: also look for one by the study's name. Without it, a new study may share its name with an older one.

        Raises:
            BlockingIOError: another process is sending this study.
            Exception: whatever MLflow raises.
        """
        self._connect()
        self._leave_the_original()
        tags = {STUDY_TAG: self.config.study, ROLE_TAG: OF_STUDY}
        run = self._find(tags, search=search)
        self._take(run or self.client.create_run(self._experiment_id, run_name=self.config.study, tags=tags))
        self._set_tags(self.run, tags)

    def describe(self, tags: Mapping[str, str], numbers: Mapping[str, float], *, time_ms: int) -> None:
        """Say what is known of the study: tags, and numbers, which are of `time_ms`."""
        self._describe(self.run, tags, numbers, time_ms)

    def describe_child(self, run_id: str, tags: Mapping[str, str], numbers: Mapping[str, float], time_ms: int) -> None:
        """Put an MLflow run below the study's and say what is known of it, if the tracker has it."""
        child = _active_run(self.client, run_id)
        if child is not None:
            self._describe(child, {**tags, PARENT_TAG: self.run.info.run_id}, numbers, time_ms)

    def attach(self, files: Sequence[Path]) -> None:
        """Put files on the study's page; one of the same name is replaced."""
        refuse_local_artifacts(self.config.uri, self.run.info.artifact_uri)
        for file in files:
            self.client.log_artifact(self.run.info.run_id, str(file))

    def _describe(self, run: Any, tags: Mapping[str, str], numbers: Mapping[str, float], time_ms: int) -> None:
        self._set_tags(run, tags)
        # at step 0: MLflow draws numbers of other steps as curves
        news = [
            (name, value, time_ms, 0)
            for name, value in numbers.items()
            if math.isfinite(value) and run.data.metrics.get(name) != value
        ]
        if news:
            _log_points(self.client, run.info.run_id, news)


def open_client(uri: str) -> Any:
    """Open a client of the tracker; a database file that is not there is made."""
    os.environ.update(ENVIRONMENT | os.environ)
    from mlflow.tracking import MlflowClient

    file = database_file(uri)
    if file is not None and not file.exists():
        _make_database(file)
    return MlflowClient(tracking_uri=uri)


def _make_database(file: Path) -> None:
    """Let a new database appear whole: MLflow takes seconds for its tables, and one cut short never works again."""
    from mlflow.tracking import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=".mlflow-", ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / file.name
        MlflowClient(tracking_uri=database_uri(draft)).search_experiments(max_results=1)
        try:
            os.link(draft, file)
        except FileExistsError:
            pass  # another run was first
        except OSError:
            os.rename(draft, file)  # a file system without links


def _active_run(client: Any, run_id: str) -> Any:
    """Return the MLflow run; None if the tracker does not have it or has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _log_points(client: Any, run_id: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, metrics=[Metric(*point) for point in points])


def _marks_of(run: Any) -> dict[str, int]:
    """Return the newest step of each kind of record that the tracker has of a run."""
    return {match[1]: int(step) for name, step in run.data.metrics.items() if (match := MARK.fullmatch(name))}


def read_state(folder: Path) -> dict[str, str]:
    """Read mlflow.json of a folder; empty where there is none, or none that can be read."""
    try:
        state = read_json(folder / STATE)
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in state.items() if isinstance(value, str)} if isinstance(state, dict) else {}


def update_state(folder: Path, **changes: str | None) -> None:
    """Change values of mlflow.json, None taking one away; the file is replaced whole, if that makes a difference."""
    known = read_state(folder)
    changed = {name: value for name, value in (known | changes).items() if value is not None}
    if changed != known:
        with atomic_file(folder / STATE) as file:
            file.write(json.dumps(changed).encode())


def how_it_ended(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return FINISHED, FAILED or KILLED, as a run has noted it, or as its record says of one that could not.

    settings: of the run, flat; a record that reaches `loop.epochs` is FINISHED, any other KILLED.
    """
    noted = read_state(folder).get("status", "")
    if noted in ENDED:
        return noted
    last = max((record.get("epoch", 0) for record in RunRecord(folder).read()), default=0)
    return "FINISHED" if last >= settings.get("loop.epochs", math.inf) else "KILLED"


def log_picture(run: str | Path, picture: Path, uri: str, *, group: str = "") -> None:
    """Put a picture on the page that the tracker at `uri` has of a run folder, under "pictures/group".

    The folder may be somebody else's, so it only says which page is its own: the tracker is the caller's word. With an
    empty `uri` nothing is sent. Nothing is raised, since the picture itself is on disk: one line says why it is not on
    the page. Of a model that was not trained here, nothing is said.
    """
    if not uri or not RunRecord.exists(Path(run)):
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # nobody else repeats it
    uri, state = absolute_uri(uri), read_state(Path(run))
    if state.get("uri") != uri or not state.get("run_id"):
        print(f"mlflow: {run}/{STATE} names no page of {uri}, so {picture} is on disk only", flush=True)
        return
    try:
        client = open_client(uri)
        refuse_local_artifacts(uri, client.get_run(state["run_id"]).info.artifact_uri)
        place = f"pictures/{group}" if group else "pictures"
        client.log_artifact(state["run_id"], str(picture), artifact_path=place)
    except Exception as error:  # whatever a tracker throws
        print(f"mlflow: {reason(error)}; {picture} is on disk only", flush=True)


def refuse_local_artifacts(uri: str, place: str) -> None:
    """Raise ValueError if a tracker wants files written on this machine, anywhere but beside its own database file."""
    own = artifact_folder(uri)
    path = place.removeprefix("file://").removeprefix("file:")
    is_local = path != place or ("://" not in place and not place.startswith("mlflow-artifacts:"))
    if is_local and not (own and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(own))):
        raise ValueError(f"{uri} wants files written to {place} of this machine, which only a database beside it may")


def code_version() -> str | None:
    """Return the commit of this code, with "-dirty" where files differ from it; None where it is no checkout."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent)]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(git + describe, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def reason(error: Exception) -> str:
    """Put an exception into one short line without secrets."""
    return f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:120]}"
