"""A tracker in memory that keeps what it is told as often as it is told it, and fails when a test says so."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.tracking import curves
from training.tracking.mlflow import RunPage
from training.tracking.record import Record, RunRecord, TrackingConfig

URI = "http://tracker:5000"
ALL_OF_IT = TrackingConfig()
Points = dict[tuple[str, int], list[float]]


def train_record(step: int, **values: object) -> Record:
    position = {"kind": "train", "step": step, "time": 1000.0 + step}
    return position | {"loss_avg": 1 / step, "loss": [2.0, step / 2]} | values


def validation_record(step: int, **values: object) -> Record:
    return {"kind": "validation", "step": step, "time": 1000.5 + step, "loss_avg": 2 / step} | values


def points_of(records: list[Record], config: TrackingConfig = ALL_OF_IT) -> Points:
    """What a tracker must hold of a record: every metric of every step, with one value."""
    found: Points = defaultdict(list)
    for name, value, _, step in [point for record in records for point in curves.points_of(record, config)]:
        found[name, step].append(value)
    return dict(found)


class Killed(BaseException):
    """In the place of SIGKILL: nothing in the code may catch it."""


class FakeMLflow:
    """Speaks as MlflowClient does, as far as it is asked; unlike MLflow's database, it keeps equal points twice.

    `fail(call)` is asked at every call, by its number, for "" or how it fails: "refused" before anything is done,
    "lost" after all is done; "killed" and "killed after" likewise, and the process ends.
    """

    def __init__(self) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.points: dict[str, list[tuple[str, int, float]]] = defaultdict(list)
        self.calls: list[str] = []
        self.fail: Callable[[int], str] = lambda call: ""
        self.experiments: dict[str, str] = {}
        self.experiment_tags: dict[str, str] = {}
        self.artifacts: dict[tuple[str, str], bytes] = {}

    def changes(self) -> list[str]:
        """The calls that have changed something, or may have."""
        return [call for call in self.calls if not call.startswith(("get", "search"))]

    def active(self) -> list[SimpleNamespace]:
        return [run for run in self.runs.values() if run.info.lifecycle_stage == "active"]

    def history(self) -> Points:
        """The points of the only active run."""
        [run] = self.active()
        found: Points = defaultdict(list)
        for name, step, value in self.points[run.info.run_id]:
            found[name, step].append(value)
        return dict(found)

    @contextmanager
    def _answering(self, name: str) -> Iterator[None]:
        self.calls.append(name)
        fault = self.fail(len(self.calls) - 1)
        if fault in ("refused", "killed"):
            raise ConnectionError("connection refused") if fault == "refused" else Killed
        yield
        if fault in ("lost", "killed after"):
            raise ConnectionError("connection reset") if fault == "lost" else Killed

    def get_experiment_by_name(self, name: str) -> Any:
        with self._answering("get_experiment_by_name"):
            return SimpleNamespace(experiment_id="7") if name in self.experiments else None

    def create_experiment(self, name: str, *, artifact_location: str | None) -> str:
        with self._answering("create_experiment"):
            assert name not in self.experiments
            self.experiments[name] = "7"
        return "7"

    def create_run(self, experiment_id: str, *, run_name: str, tags: dict[str, str]) -> Any:
        with self._answering("create_run"):
            run_id = f"{len(self.runs) + 1:032x}"
            info = {"run_id": run_id, "run_name": run_name, "status": "RUNNING", "experiment_id": experiment_id}
            info |= {"lifecycle_stage": "active", "start_time": len(self.runs)}
            data = SimpleNamespace(metrics={}, params={}, tags=dict(tags))
            self.runs[run_id] = SimpleNamespace(
                info=SimpleNamespace(**info, artifact_uri="mlflow-artifacts:/"), data=data
            )
        return self.runs[run_id]

    def get_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

        with self._answering("get_run"):
            if run_id not in self.runs:
                raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
            return self.runs[run_id]

    def search_runs(self, experiment_ids: list[str], filter_string: str, *, max_results: int) -> list[Any]:
        with self._answering("search_runs"):
            wanted = dict(re.findall(r"tags\.`(.+?)` = '(.*?)'", filter_string))
            newest_first = reversed(self.active())
            return [run for run in newest_first if wanted.items() <= run.data.tags.items()][:max_results]

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100
        with self._answering("log_batch"):
            run = self.runs[run_id]
            assert run.info.lifecycle_stage == "active"
            for param in params:
                assert run.data.params.setdefault(param.key, param.value) == param.value
            for metric in metrics:
                self.points[run_id].append((metric.key, metric.step, metric.value))
                run.data.metrics[metric.key] = metric.value

    def log_artifact(self, run_id: str, file: str) -> None:
        with self._answering("log_artifact"):
            self.artifacts[run_id, Path(file).name] = Path(file).read_bytes()

    def get_experiment(self, experiment_id: str) -> Any:
        with self._answering("get_experiment"):
            return SimpleNamespace(experiment_id=experiment_id, tags=self.experiment_tags)

    def set_experiment_tag(self, experiment_id: str, name: str, value: str) -> None:
        with self._answering("set_experiment_tag"):
            self.experiment_tags[name] = value

    def set_tag(self, run_id: str, name: str, value: str) -> None:
        with self._answering("set_tag"):
            self.runs[run_id].data.tags[name] = value

    def update_run(self, run_id: str, *, status: str) -> None:
        with self._answering("update_run"):
            self.runs[run_id].info.status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        with self._answering("set_terminated"):
            self.runs[run_id].info.status = status

    def delete_run(self, run_id: str) -> None:
        with self._answering("delete_run"):
            assert self.runs[run_id].info.lifecycle_stage == "active"
            self.runs[run_id].info.lifecycle_stage = "deleted"


def connect(client: FakeMLflow, monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    """Let every tracker be this one."""
    monkeypatch.setattr("training.tracking.mlflow.open_client", lambda uri: client)
    return client


def page_of(folder: Path, uri: str = URI, tracking: dict[str, Any] | None = None, **parameters: Any) -> RunPage:
    config = TrackingConfig(**{"uri": uri, "experiment": "test"} | (tracking or {}))
    return RunPage(folder, config, parameters)


def sender_of(folder: Path) -> int | None:
    """The process that sends the run of this folder; None if there is none, or it has ended."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            if "training.tracking.follow" in words and str(folder) in words:
                return int(process.name)
    return None


def record_of(folder: Path, *records: Record) -> RunRecord:
    record = RunRecord(folder)
    record.write(list(records))
    return record
