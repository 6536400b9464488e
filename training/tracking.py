"""The record of a run, and MLflow as a view of it.

`metrics.jsonl` is the record: one JSON object a line, written and flushed before anybody else hears of it. MLflow is
fed from that file by a background thread, so the file is also its queue: training never waits for a tracker, a tracker
that is down costs nothing but its curves, and it is fed from where it stopped when the run starts again.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SECTIONS = {
    "loss": ("loss",),
    "progress": ("epoch", "samples_seen", "pflop", "learning_rate", "gradient_norm"),
    "quality": ("error", "psnr", "squared_error", "codebook_use"),
    "speed": ("images_per_second", "tokens_per_second", "data_wait_share"),
}
SQLITE = "sqlite:///"
NOT_DRAWN = {
    "train": ("step", "time"),
    "validation": ("step", "time", "epoch", "samples_seen", "pflop"),  # the training records have them
}


@dataclass(frozen=True)
class TrackingConfig:
    """Where the curves go besides metrics.jsonl."""

    mlflow: bool = True
    uri: str = "sqlite:///runs/mlflow.db"
    experiment: str = "var"


class RunRecord:
    """metrics.jsonl of one run folder, written by rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the folder is that of a training run."""
        return (folder / "metrics.jsonl").is_file()

    def write(self, records: list[Record]) -> None:
        """Append records, one JSON object a line, and hand them to the operating system at once."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(without_infinities(record), allow_nan=False) + "\n" for record in records)

    def read(self) -> list[Record]:
        """All complete records; a last line cut by a crash is left out."""
        return [record for record, _ in self.read_from(0)]

    def read_from(self, offset: int) -> Iterator[tuple[Record, int]]:
        """The complete records from byte `offset` on, each with the offset of what follows it."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield json.loads(line), offset

    def forget_after(self, step: int) -> None:
        """Drop what was recorded after the checkpoint at `step`: those steps are about to be taken again."""
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            for record, _ in self.read_from(0):
                if record["step"] <= step:
                    file.write(json.dumps(record) + "\n")
        os.replace(temporary, self.path)


class MLflowView:
    """Feeds MLflow from metrics.jsonl in the background; never raises into training.

    `mlflow.json` in the run folder keeps the tracker, the MLflow run's id and how many steps it has, so that a run that
    is started again goes on in the same MLflow run and sends no step twice. A tracker that fails is tried again at the
    next news; one that does not know the run, because it is another or a new one, gets all of it.
    """

    def __init__(self, folder: Path, config: TrackingConfig, parameters: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.parameters = parameters
        self.record = RunRecord(folder)
        self._offset = 0  # of what is still to be read in metrics.jsonl
        self._news = threading.Event()
        self._closing = threading.Event()
        self._final_status = "FINISHED"
        self._thread = threading.Thread(target=self._follow, name="mlflow-view", daemon=True)

    def notify(self) -> None:
        """There are new records to send. The first call starts the thread, after data workers have been forked."""
        if self._thread.ident is None:
            self._thread.start()
        self._news.set()

    def close(self, *, failed: bool = False, patience_seconds: float = 60.0) -> None:
        """Send what is left and mark the MLflow run as finished or failed; gives up after `patience_seconds`."""
        if self._thread.ident is None:
            return
        self._final_status = "FAILED" if failed else "FINISHED"
        self._closing.set()
        self._news.set()
        self._thread.join(patience_seconds)

    def _follow(self) -> None:
        client: Any = None
        state: dict[str, Any] = {}
        failures = 0
        closing = False
        while not closing:
            self._news.wait()
            self._news.clear()
            closing = self._closing.is_set()  # before reading: what was written by then will be sent
            try:
                if client is None:
                    client, state = self._connect()
                self._send_new(client, state)
                failures = 0
            except Exception as error:  # whatever a tracker throws must not reach training: the record is complete
                failures += 1
                if failures == 1:
                    print(f"mlflow: {_reason(error)}; metrics.jsonl goes on", flush=True)
        if client is not None and not failures:
            client.set_terminated(state["run_id"], self._final_status)

    def _connect(self) -> tuple[Any, dict[str, Any]]:
        uri = absolute_uri(self.config.uri)
        client = _open_client(uri)
        state = _read_state(self.folder)
        if state is None or state["uri"] != uri or not _knows_run(client, state["run_id"]):
            run = client.create_run(self._experiment_id(client), run_name=self._run_name())
            place = {"uri": uri, "run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
            state = place | {"train": -1, "validation": -1}
            for name, value in self.parameters.items():
                client.log_param(state["run_id"], name, str(value)[:500])
            self._write_state(state)
        else:
            client.update_run(state["run_id"], status="RUNNING")
        return client, state

    def _experiment_id(self, client: Any) -> str:
        name, uri = self.config.experiment, absolute_uri(self.config.uri)
        experiment = client.get_experiment_by_name(name)
        if experiment:
            return experiment.experiment_id
        return client.create_experiment(name, artifact_location=artifact_folder(uri))

    def _run_name(self) -> str:
        return "/".join(self.folder.parts[-2:])

    def _send_new(self, client: Any, state: dict[str, Any]) -> None:
        records = self.record.read_from(self._offset)
        while batch := list(islice(records, 20)):
            self._send([record for record, _ in batch if record["step"] > state[record["kind"]]], client, state)
            self._offset = batch[-1][1]

    def _send(self, records: list[Record], client: Any, state: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(record["time"] * 1000), record["step"])
            for record in records
            for name, value in flatten_metrics(record).items()
        ]
        for first in range(0, len(metrics), 1000):  # MLflow takes at most 1,000 in one call
            client.log_batch(state["run_id"], metrics=metrics[first : first + 1000])
        for record in records:
            state[record["kind"]] = record["step"]
        self._write_state(state)

    def _write_state(self, state: dict[str, Any]) -> None:
        temporary = self.folder / "mlflow.json.tmp"
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self.folder / "mlflow.json")


def log_picture(run: str | Path, picture: Path, *, group: str = "") -> None:
    """Put a picture on the page of the run's MLflow run, under "pictures/group"; says in one line if that cannot be.

    The MLflow run is the one that `run`/mlflow.json names. What was not trained here has none, of which nothing is
    said. Nothing is raised: the picture itself is on disk.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; unlike the curves, a picture is waited for
    try:
        state = _read_state(Path(run))
        if state is None:
            if RunRecord.exists(Path(run)):
                print(f"mlflow: {run} has no mlflow.json, so {picture} is on disk only", flush=True)
            return
        place = "/".join(filter(None, ("pictures", group)))
        _open_client(state["uri"]).log_artifact(state["run_id"], str(picture), artifact_path=place)
    except Exception as error:  # whatever a tracker throws must not reach the caller: the picture is on disk
        print(f"mlflow: {_reason(error)}; {picture} is on disk only", flush=True)


def _open_client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _read_state(folder: Path) -> dict[str, Any] | None:
    """What mlflow.json of a run folder holds, if there is one."""
    path = folder / "mlflow.json"
    return json.loads(path.read_text()) if path.exists() else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def without_infinities(record: Record) -> Record:
    """None where a number is not finite, such as the gradient's norm at a step that loss scaling skips."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _knows_run(client: Any, run_id: str) -> bool:
    """Whether the tracker has this run; a tracker that cannot be asked raises."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def flatten_metrics(record: Record) -> dict[str, float]:
    """A record as MLflow metrics "section/kind_name": MLflow draws a section of charts for each, the losses first.

    Lists become one series per scale, such as "scales/train_loss_03".
    """
    kind = record["kind"]
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, list):
            flat |= {f"scales/{kind}_{name}_{k + 1:02d}": float(item) for k, item in enumerate(value)}
        elif isinstance(value, (int, float)) and name not in NOT_DRAWN[kind]:
            flat[f"{_section(name)}/{kind}_{name}"] = float(value)
    return flat


def _section(name: str) -> str:
    return next((section for section, prefixes in SECTIONS.items() if name.startswith(prefixes)), "loss_parts")


def absolute_uri(uri: str) -> str:
    """sqlite:///relative.db with the path made absolute and its folder made; any other URI as it is."""
    if not uri.startswith(SQLITE):
        return uri
    path = Path(uri.removeprefix(SQLITE)).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"{SQLITE}{path}"


def artifact_folder(uri: str) -> str | None:
    """Where pictures go: beside a database file, not where the command was started; None leaves it to a server."""
    return str(Path(uri.removeprefix(SQLITE)).parent / "mlflow_artifacts") if uri.startswith(SQLITE) else None


def wall_time() -> float:
    """Seconds since the epoch, for records; durations are measured with time.monotonic instead."""
    return time.time()
