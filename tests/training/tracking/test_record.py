"""metrics.jsonl is the record: whole lines only, on disk when written, never silently shortened."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trackers import train_record

from training.tracking.mlflow import open_client
from training.tracking.record import (
    RunRecord,
    TrackingConfig,
    absolute_uri,
    artifact_folder,
    database_file,
    database_uri,
)


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord(tmp_path / "run")


@pytest.fixture
def full_disk() -> Iterator[pytest.MonkeyPatch]:
    """A disk that forces nothing to itself; `undo` makes room."""

    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield patch


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"every": 0}, "tracking.every is 0; it is a number of steps, 1 or more"),
        ({"curve_unit": "FLOP"}, "tracking.curve_unit is FLOP; accepted: PFLOP, TFLOP, GFLOP, MFLOP"),
        ({"study": "it's"}, "tracking.study is it's; it must hold no quotation mark"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        TrackingConfig(**wrong)


def test_a_resumed_run_writes_on_after_a_cut_line(record: RunRecord) -> None:
    assert record.read() == []
    record.write([train_record(1), train_record(2)])
    record.path.write_bytes(record.path.read_bytes()[:-5])
    assert record.read() == [train_record(1)]
    record.forget_after(1)
    record.write([train_record(2)])
    assert [entry["step"] for entry in record.read()] == [1, 2]


def test_what_is_forgotten_is_forgotten_whole_or_not_at_all(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    record.write([train_record(step) for step in (1, 2, 3, 4)])

    def refuse(old: Path, new: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError):
        record.forget_after(2)
    assert [entry["step"] for entry in record.read()] == [1, 2, 3, 4]
    assert [path.name for path in record.path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_is_named_once_and_stays(record: RunRecord, capsys: pytest.CaptureFixture[str]) -> None:
    record.write([train_record(step) for step in (1, 2, 3, 4)])
    lines = record.path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"{", b"\xff")
    record.path.write_bytes(b"".join(lines))
    assert [entry["step"] for entry in record.read()] == [entry["step"] for entry in record.read()] == [1, 3, 4]
    assert capsys.readouterr().out.count(f"{record.path}: line 2 is damaged") == 1
    RunRecord(record.path.parent).forget_after(3)
    assert record.path.read_bytes() == b"".join(lines[:3])
    assert "line 2 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ['{"step": 3}', '{"kind": [], "step": 3}', "7", *(f'{{"kind": "train", "step": {step}}}' for step in ('"3"', -1))],
)
def test_a_line_that_is_json_but_no_record_is_damaged_too(
    record: RunRecord, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write([train_record(1)])
    with record.path.open("a") as file:
        file.write(f"{line}\n")
    record.write([train_record(2)])
    assert [entry["step"] for entry in record.read()] == [1, 2]
    assert "line 2 is damaged" in capsys.readouterr().out


def test_a_full_disk_costs_one_line_and_no_record(
    record: RunRecord, full_disk: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write([train_record(1)])
    record.write([train_record(2), train_record(3)])
    assert record.read() == []
    full_disk.undo()
    record.write([train_record(4)])
    assert [entry["step"] for entry in record.read()] == [1, 2, 3, 4]
    said = capsys.readouterr().out.splitlines()
    assert ["No space left" in said[0], "written again, with 4 records" in said[1], len(said)] == [True, True, 2]


def test_a_disk_that_stays_full_ends_the_run(
    record: RunRecord, full_disk: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.tracking.record.MAX_UNWRITTEN", 3)
    record.write([train_record(step) for step in (1, 2, 3)])
    with pytest.raises(OSError):
        record.write([train_record(4)])


def test_a_relative_database_is_made_absolute_and_other_trackers_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert not (tmp_path / "runs").exists()
    assert absolute_uri("http://host:5000") == "http://host:5000"


def test_only_a_database_file_has_a_folder_of_pictures_beside_it() -> None:
    assert artifact_folder("sqlite:////data/mlflow.db") == "/data/mlflow_artifacts"
    assert artifact_folder("http://host:5000") is None


@pytest.mark.parametrize("name", ["my runs", "my%20runs"])
def test_the_path_in_a_trackers_address_is_quoted_once(tmp_path: Path, name: str) -> None:
    """MLflow reads %20 as a blank; a folder whose name has a per cent sign is found all the same."""
    folder = tmp_path / name
    folder.mkdir()
    uri = database_uri(folder / "mlflow.db")
    assert database_file(uri) == folder / "mlflow.db" and absolute_uri(uri) == uri
    open_client(uri)
    assert (folder / "mlflow.db").is_file()
    assert database_file(f"sqlite:///{tmp_path}/my%20runs/mlflow.db") == tmp_path / "my runs" / "mlflow.db"


def test_a_database_in_the_home_folder_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    assert absolute_uri("sqlite:///~/mlflow.db") == "sqlite:////home/anna/mlflow.db"
