"""A run of a study as a process: one at a time, asked to stop by a file, its end put into words."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from study_training import StudyTraining

from launchers.study.process import (
    LOCK,
    TrainingProcess,
    ask_to_stop,
    command_line,
    is_trained_elsewhere,
    last_words,
    take_lock,
)
from launchers.study.state import PlannedRun, plan_runs


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyTraining:
    return StudyTraining(tmp_path, monkeypatch)


@pytest.fixture
def run(training: StudyTraining) -> PlannedRun:
    return plan_runs(training.config)[0]


def end_of(process: TrainingProcess) -> int:
    while (code := process.exit_code()) is None:
        time.sleep(0.01)
    process.close()
    return code


def test_the_command_is_what_a_user_would_type(training: StudyTraining, run: PlannedRun) -> None:
    command = command_line(["python", "-u"], run)
    assert command[:3] == [str(Path(sys.executable).with_name("python")), "-u", str(training.folder / "train.py")]
    assert command[3:5] == ["--config", str(training.folder / "a.yaml")]
    assert f"run={run.folder}" in command and "seed=0" in command and "tracking.mlflow=false" in command


@pytest.mark.parametrize("start, words", [([], "start is empty"), (["no-such-program"], "start is no-such-progr")])
def test_a_program_that_is_not_there_is_refused(run: PlannedRun, start: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        command_line(start, run)


@pytest.mark.parametrize("deed, code", [("step:1", 0), ("exit:70", 70), ("exit:75", 75)])
def test_the_code_is_that_of_the_run(training: StudyTraining, run: PlannedRun, deed: str, code: int) -> None:
    training.plan(a=[[deed]])
    assert end_of(TrainingProcess(training.config.start, run)) == code


def test_a_killed_run_has_a_shells_code(training: StudyTraining, run: PlannedRun) -> None:
    training.plan(a=[["wait"]])
    assert end_of(TrainingProcess(["bash", "-c", "kill -KILL $$"], run)) == 137


def test_a_run_is_trained_by_one_process_at_a_time(training: StudyTraining, run: PlannedRun) -> None:
    training.plan(a=[["wait", "exit:75"]])
    assert not is_trained_elsewhere(run)
    process = TrainingProcess(training.config.start, run)
    assert is_trained_elsewhere(run)
    with pytest.raises(BlockingIOError, match="a-seed0: another process trains this run"):
        TrainingProcess(training.config.start, run)
    ask_to_stop(run)
    assert end_of(process) == 75
    assert not is_trained_elsewhere(run)


def test_the_run_holds_its_lock_when_the_study_is_gone(training: StudyTraining, run: PlannedRun) -> None:
    training.plan(a=[["wait"]])
    process = TrainingProcess(training.config.start, run)
    assert not list_descriptors(run.folder / LOCK), "all that the study holds ends with the study"
    assert is_trained_elsewhere(run)
    ask_to_stop(run)
    assert end_of(process) == 0 and not is_trained_elsewhere(run)


def list_descriptors(path: Path) -> list[str]:
    """What this process has open of a file."""
    return [name for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}") == str(path)]


def test_a_wish_to_stop_that_nobody_has_seen_is_taken_back(training: StudyTraining, run: PlannedRun) -> None:
    training.plan(a=[["exit:1"]])
    run.folder.mkdir(parents=True)
    ask_to_stop(run)
    process = TrainingProcess(training.config.start, run)
    assert not (run.folder / "stop").exists()
    while process.exit_code() is None:
        time.sleep(0.01)
    ask_to_stop(run)
    process.close()
    assert not (run.folder / "stop").exists()


def test_a_run_that_is_left_behind_is_asked_to_save_and_end(training: StudyTraining, run: PlannedRun) -> None:
    training.plan(a=[["wait", "exit:75"]])
    process = TrainingProcess(training.config.start, run)
    process.close()
    while process.exit_code() is None:
        time.sleep(0.01)
    assert process.exit_code() == 75


def test_last_words_are_the_error_if_there_is_one(training: StudyTraining, run: PlannedRun) -> None:
    assert last_words(run) == ""
    training.plan(a=[["say:hello", "exit:1"], ["exit:1"], ["say:error: no data", "say:[INFO] exits"]])
    end_of(TrainingProcess(training.config.start, run))
    assert last_words(run) == "hello"
    end_of(TrainingProcess(training.config.start, run))
    assert last_words(run) == "no word of its own"
    end_of(TrainingProcess(training.config.start, run))
    assert last_words(run) == "error: no data"


def test_a_lock_is_free_again_once_it_is_closed(tmp_path: Path) -> None:
    first = take_lock(tmp_path / "new" / "lock")
    assert first is not None and take_lock(tmp_path / "new" / "lock") is None
    os.close(first)
    second = take_lock(tmp_path / "new" / "lock")
    assert second is not None
    os.close(second)
