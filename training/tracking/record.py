"""The record of a run, metrics.jsonl, and the settings of the trackers that show it.

The record holds one JSON object a line, on disk before anybody else hears of it. MLflow shows the record and can be
rebuilt from it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import unquote

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.json_lines import BEGINNING, Line, Place, append_lines, number_of, read_lines
from training.tracking.redaction import REMEDY, secret_in

Record = dict[str, Any]

SQLITE = "sqlite:///"
ENVIRONMENT_URI = "MLFLOW_TRACKING_URI"  # which counts where the configuration names no tracker
CURVE_UNITS = {"PFLOP": 1, "TFLOP": 10**3, "GFLOP": 10**6, "MFLOP": 10**9}  # units in one PFLOP
MAX_UNWRITTEN = 10_000  # records kept in memory while the disk refuses them


@dataclass(frozen=True)
class TrackingConfig:
    """Where the curves go besides metrics.jsonl, and which of them."""

    mlflow: bool = True
    uri: str = field(default_factory=lambda: os.environ.get(ENVIRONMENT_URI) or f"{SQLITE}runs/mlflow.db")
    experiment: str = "var"
    every: int = 1  # MLflow gets the training records of the steps that it divides
    curve_unit: str = "TFLOP"  # compute in one step of `curve/*`; small runs need a small one
    study: str = ""  # the scaling study that a run belongs to, by the name of its MLflow run; empty: none

    def __post_init__(self) -> None:
        if what := secret_in(self.uri):  # the environment's has not been looked at yet
            raise ValueError(f"tracking.uri, from the configuration or {ENVIRONMENT_URI}, holds {what}; {REMEDY}")
        if self.every < 1:
            raise ValueError(f"tracking.every is {self.every}; it is a number of steps, 1 or more")
        if self.curve_unit not in CURVE_UNITS:
            raise ValueError(f"tracking.curve_unit is {self.curve_unit}; accepted: {', '.join(CURVE_UNITS)}")
        if "'" in self.study:
            raise ValueError(f"tracking.study is {self.study}; it must hold no quotation mark")


class RunRecord:
    """The file metrics.jsonl of one run folder, written by rank 0 only.

    A line that is no record is damage: it is reported once by its number, left out by readers, and stays in the file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._unwritten: list[Record] = []
        self._reported: set[Place] = set()  # the damaged lines already named
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Tell whether the folder is that of a training run."""
        return (folder / "metrics.jsonl").is_file()

    def flush(self) -> None:
        """Write the records that wait in memory, if any do. Raises OSError if the disk refuses them."""
        if self._unwritten:
            append_lines(self.path, self._unwritten)
            print(f"{self.path}: written again, with {len(self._unwritten)} records", flush=True)
            self._unwritten.clear()

    def missing_steps(self, step: int) -> list[int]:
        """List the steps up to `step` of which there is no training record."""
        recorded = {record["step"] for record, _ in self.read_after() if record["kind"] == "train"}
        return [number for number in range(1, step + 1) if number not in recorded]

    def write(self, records: list[Record]) -> None:
        """Append records and force them to disk.

        A disk that refuses them does not stop training: one line reports it, and they are written with the next ones.

        Raises:
            OSError: the disk has refused more than 10,000 records.
        """
        was_failing = bool(self._unwritten)
        self._unwritten += records
        try:
            if was_failing:
                self.flush()
            else:
                append_lines(self.path, records)
                self._unwritten.clear()
        except OSError as error:
            if len(self._unwritten) > MAX_UNWRITTEN:
                raise
            if not was_failing:
                print(f"{self.path}: {error.strerror or error}; records wait in memory until it takes them", flush=True)

    def read(self) -> list[Record]:
        """Read all records."""
        return [record for record, _ in self.read_after()]

    def read_after(self, place: Place = BEGINNING) -> Iterator[tuple[Record, Place]]:
        """Yield the records after `place`, each with its own; all of them if the file has been replaced since."""
        for line in read_lines(self.path, place):
            if _is_record(line.value):
                yield line.value, line.place
            else:
                self._report_damage(line)

    def forget_after(self, step: int) -> None:
        """Drop what was recorded after the checkpoint at `step`: those steps are about to be taken again.

        A damaged line stays if a record that is kept follows it.

        Raises:
            OSError: the disk does not take the new file; the old one is still there.
        """
        damaged = b""
        with atomic_file(self.path) as file:
            for line in read_lines(self.path):
                if not _is_record(line.value):
                    self._report_damage(line)
                    damaged += line.content
                elif line.value["step"] <= step:
                    file.write(damaged + line.content)
                    damaged = b""

    def _report_damage(self, line: Line) -> None:
        if line.place not in self._reported:
            self._reported.add(line.place)
            number = number_of(self.path, line)
            print(f"{self.path}: line {number} is damaged, no record of a step; readers leave it out", flush=True)


def _is_record(value: dict[str, Any] | None) -> TypeGuard[Record]:
    if value is None or not isinstance(value.get("kind"), str):
        return False
    return type(value.get("step")) is int and value["step"] >= 0


def absolute_uri(uri: str) -> str:
    """Make the path of sqlite:///relative.db absolute; leave any other URI as it is."""
    file = database_file(uri)
    return database_uri(file.absolute()) if file else uri


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite database; None for any other tracker."""
    return Path(unquote(uri.removeprefix(SQLITE))).expanduser() if uri.startswith(SQLITE) else None


def database_uri(file: Path) -> str:
    """Return the URI of a SQLite database; MLflow takes %20 and the like in it for what they stand for."""
    return f"{SQLITE}{str(file).replace('%', '%25')}"


def artifact_folder(uri: str) -> str | None:
    """Return where pictures go: beside a database file, whatever the working folder is; None leaves it to a server."""
    file = database_file(uri)
    return str(file.parent / "mlflow_artifacts") if file else None


def wall_time() -> float:
    """Return the seconds since the epoch, for records; durations are measured with time.monotonic instead."""
    return time.time()
