"""The record of a run, and where its curves go.

`metrics.jsonl` is the record: one JSON object a line, on disk before anybody else hears of it. MLflow is a view of it
(see training/tracking/mlflow_view.py); which of its numbers are drawn, and where, says training/tracking/curves.py.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files.strict_json import parse_json
from training import seams

Record = dict[str, Any]

SQLITE = "sqlite:///"
CURVE_UNITS = {"PFLOP": 1, "TFLOP": 10**3, "GFLOP": 10**6, "MFLOP": 10**9}  # how many make a PFLOP
MAX_UNWRITTEN = 10_000  # records kept in memory while the disk refuses them


@dataclass(frozen=True)
class TrackingConfig:
    """Where the curves go besides metrics.jsonl."""

    mlflow: bool = True
    uri: str = "sqlite:///runs/mlflow.db"
    experiment: str = "var"
    every: int = 1  # steps: MLflow gets the training records of its multiples, best one of loop.log_every
    curve_unit: str = "TFLOP"  # of the steps of `curve/*`: PFLOP, TFLOP, GFLOP or MFLOP, so that small runs reach 1
    study: str = ""  # the scaling study that a run belongs to, by the name of its MLflow run; empty: none

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"tracking.every is {self.every}; it is a number of steps, 1 or more")
        if self.curve_unit not in CURVE_UNITS:
            raise ValueError(f"tracking.curve_unit is {self.curve_unit}; accepted: {', '.join(CURVE_UNITS)}")
        if "'" in self.study:
            raise ValueError(f"tracking.study is {self.study}; it must hold no quotation mark")


@dataclass(frozen=True)
class Place:
    """How far a reader has come: a byte offset, and the file it is one of, since a record may be replaced."""

    file: int = 0
    offset: int = 0


class RunRecord:
    """metrics.jsonl of one run folder, written by rank 0 only.

    A last line without its end is one that a crash has cut, or that is being written: readers leave it out. A line
    within the file that is no record is damage: it is named once by its number, and stays in the file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self._unwritten: list[bytes] = []
        self._said: set[Place] = set()  # the damaged lines already named
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether the folder is that of a training run."""
        return (folder / "metrics.jsonl").is_file()

    def write(self, records: list[Record]) -> None:
        """Append records, one JSON object a line, and force them to disk.

        A disk that refuses them does not stop training: that is said in one line, and they are written with the next.

        Raises:
            OSError: the disk has refused more than 10,000 records.
        """
        was_failing = bool(self._unwritten)
        self._unwritten += [_to_line(record) for record in records]
        try:
            self._append(b"".join(self._unwritten))
        except OSError as error:
            if len(self._unwritten) > MAX_UNWRITTEN:
                raise
            if not was_failing:
                print(f"{self.path}: {error.strerror or error}; records wait in memory until it takes them", flush=True)
            return
        if was_failing:
            print(f"{self.path}: written again, with {len(self._unwritten)} records", flush=True)
        self._unwritten.clear()

    def read(self) -> list[Record]:
        """All records."""
        return [record for record, _ in self.read_after()]

    def read_after(self, place: Place = Place()) -> Iterator[tuple[Record, Place]]:
        """The records after `place`, each with its own; all of them if the file was replaced since."""
        for line, here in self._lines(place):
            record = _from_line(line)
            if record is None:
                self._say_damaged(here, len(line))
            else:
                yield record, here

    def forget_after(self, step: int) -> None:
        """Drop what was recorded after the checkpoint at `step`: those steps are about to be taken again.

        The file is replaced whole, or stays as it was.

        Raises:
            OSError: the disk does not take the new file.
        """
        replace_file(self.path, self._lines_up_to(step))

    def _lines_up_to(self, step: int) -> Iterator[bytes]:
        damaged: list[bytes] = []
        for line, here in self._lines(Place()):
            record = _from_line(line)
            if record is None:
                self._say_damaged(here, len(line))
                damaged.append(line)
            elif record["step"] <= step:
                yield from (*damaged, line)
                damaged.clear()

    def _lines(self, place: Place) -> Iterator[tuple[bytes, Place]]:
        """The whole lines after `place`, each with the place of its end."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            is_same = place.file == status.st_ino and place.offset <= status.st_size
            offset = file.seek(place.offset if is_same else 0)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield line, Place(status.st_ino, offset)

    def _append(self, lines: bytes) -> None:
        """Write and fsync; after an error the file is what it was."""
        with self.path.open("a+b", buffering=0) as file:
            end = _end_of_last_line(file)
            file.truncate(end)  # what a crash has left of a line
            try:
                seams.reach("record.write", file)
                written = 0
                while written < len(lines):
                    written += file.write(lines[written:])
                seams.reach("record.fsync", file)
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def _say_damaged(self, here: Place, length: int) -> None:
        if here in self._said:
            return
        self._said.add(here)
        with self.path.open("rb") as file:
            number = file.read(here.offset - length).count(b"\n") + 1
        print(f"{self.path}: line {number} is damaged, no record of a step; it is left there, and out", flush=True)


def _to_line(record: Record) -> bytes:
    return (json.dumps(without_infinities(record), allow_nan=False) + "\n").encode()


def _from_line(line: bytes) -> Record | None:
    """The record that a line holds, if it holds one."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if type(record.get("step")) is int and record["step"] >= 0 else None


def _end_of_last_line(file: BinaryIO) -> int:
    """The offset after the last line that is whole."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def replace_file(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file beside the old one, force it to disk, and put it in its place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        seams.reach("record.replace", path)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def without_infinities(record: Record) -> Record:
    """None where a number is not finite, such as the gradient's norm at a step that loss scaling skips."""
    return {name: _finite_or_none(value) for name, value in record.items()}


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def absolute_uri(uri: str) -> str:
    """sqlite:///relative.db with the path made absolute; any other URI as it is."""
    file = database_file(uri)
    return f"{SQLITE}{file.absolute()}" if file else uri


def database_file(uri: str) -> Path | None:
    """The file of a SQLite database; None for any other tracker."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def artifact_folder(uri: str) -> str | None:
    """Where pictures go: beside a database file, not where the command was started; None leaves it to a server."""
    file = database_file(uri)
    return str(file.parent / "mlflow_artifacts") if file else None


def wall_time() -> float:
    """Seconds since the epoch, for records; durations are measured with time.monotonic instead."""
    return time.time()
