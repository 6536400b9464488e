"""mlflow.json is replaced whole, and one process at a time sends a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from training.tracking.mlflow_state import ViewState, read_state


def test_none_takes_a_value_away_and_the_rest_stays(tmp_path: Path) -> None:
    ViewState(tmp_path).update(uri="a", run_id="1")
    ViewState(tmp_path).update(run_id=None, status="FINISHED")
    assert read_state(tmp_path) == {"uri": "a", "status": "FINISHED"}


def test_what_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    state = ViewState(tmp_path)
    state.update(uri="a")
    before = (tmp_path / "mlflow.json").stat().st_ino
    state.update(uri="a", run_id=None)
    assert (tmp_path / "mlflow.json").stat().st_ino == before


@pytest.mark.parametrize("content", ["", "[1]", '{"uri": ', "\x00"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "mlflow.json").write_text(content)
    assert read_state(tmp_path) is None
    ViewState(tmp_path).update(uri="a")
    assert read_state(tmp_path) == {"uri": "a"}


def test_one_process_sends_a_run_and_the_next_one_once_it_is_released(tmp_path: Path) -> None:
    first, second = ViewState(tmp_path), ViewState(tmp_path)
    first.claim()
    first.claim()
    with pytest.raises(BlockingIOError, match=str(tmp_path)):
        second.claim()
    first.release()
    second.claim()


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"[" * 10**5, b'{"uri": "a", "uri": "b"}', b'{"train": NaN}'])
def test_a_damaged_state_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mlflow.json").write_bytes(content)
    assert read_state(tmp_path) is None


def test_values_of_another_kind_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text('{"uri": 3, "run_id": "r", "train": "x", "validation": 4, "more": {}}')
    assert read_state(tmp_path) == {"run_id": "r", "validation": 4}


def test_a_state_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mlflow.json")
    assert read_state(tmp_path) is None


def test_what_is_noted_of_another_tracker_goes_and_what_is_the_runs_own_stays(tmp_path: Path) -> None:
    state = ViewState(tmp_path)
    state.note("http://a", "sizes", run_id="1", status="FAILED", git="0123")
    assert state.is_of("http://a") and not state.is_of("http://b")
    state.note("http://b", "moved")
    assert state.values == {"uri": "http://b", "experiment": "moved", "status": "FAILED", "git": "0123"}
