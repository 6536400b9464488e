"""`scaling_study.py run`: what is done is skipped, what ends early is started again, a wish to stop is handed on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from study_training import StudyTraining, write_run
from tiny import command

from data_pipeline.files.claim import Claimed, claimed_folder
from launchers.setup.config_files import load_config
from launchers.study import run as study_run
from launchers.study.config import StudyConfig
from launchers.study.run import Display, command_line, launch_run, start_training
from launchers.study.state import FAILED, LOCK, RUNNING, WAITING, is_being_trained, plan_runs
from training.supervision.stopping import Stopped


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyTraining:
    return StudyTraining(tmp_path, monkeypatch)


def go(training: StudyTraining, **options: Any) -> None:
    launch_run(command(training.config, **options))


def test_every_size_is_trained_once_in_its_order_and_skipped_when_it_is_done(
    training: StudyTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    go(training)
    said = capsys.readouterr().out
    assert "done: 2 runs; next: scaling_study.py fit" in said
    assert re.search(r"^b +0 +done +10/10 +100\.0 %", said, re.MULTILINE)
    a, b = (re.search(rf"^{size} +0 +running", said, re.MULTILINE) for size in "ab")
    assert a and b and a.start() < b.start()
    assert load_config(StudyConfig, str(training.folder / "study" / "study.yaml")) == training.config
    training.change(seeds=(0, 1), repeated=("b",))
    go(training)
    assert [len(training.starts(name)) for name in ("a-seed0", "b-seed0", "b-seed1")] == [1, 1, 1]


def test_the_command_of_a_run_is_what_a_user_would_type(training: StudyTraining) -> None:
    run = plan_runs(training.config)[0]
    words = command_line(["python", "-u"], run)
    assert words[:3] == [str(Path(sys.executable).with_name("python")), "-u", str(training.folder / "train.py")]
    assert words[3:5] == ["--config", str(training.folder / "a.yaml")]
    assert f"run={run.folder}" in words and "seed=0" in words and "tracking.mlflow=false" in words
    for start, message in (([], "start is empty"), (["no-such-program"], "start is no-such-progr")):
        with pytest.raises(ValueError, match=message):
            command_line(start, run)


def test_a_study_whose_begun_runs_would_change_is_refused_and_its_settings_stay(training: StudyTraining) -> None:
    go(training)
    (training.folder / "study" / "a-seed0" / "config.yaml").write_text("loop: {epochs: 1.0}\n")
    training.change(settings=("loop.epochs=2",))
    with pytest.raises(ValueError, match="a-seed0: was trained with loop.epochs=1.0, now 2.0 is asked for"):
        go(training)
    assert load_config(StudyConfig, str(training.folder / "study" / "study.yaml")).settings == ()


def test_a_run_that_gets_on_is_started_again_and_again(training: StudyTraining) -> None:
    training.change(attempts=1)
    training.plan(a=[[f"step:{step}", "exit:1"] for step in (2, 5, 7)] + [["step:10"]], b=[["step:10"]])
    go(training)
    assert len(training.starts("a-seed0")) == 4


def test_a_run_that_does_not_get_on_is_left_and_the_others_are_trained(
    training: StudyTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = ["say:error: out of luck", "say:[INFO] exits", "exit:74"]
    training.plan(a=[["step:3", "say:hello", "exit:1"], failing], b=[["step:10"]])
    with pytest.raises(SystemExit) as ended:
        go(training)
    assert ended.value.code == 74
    assert len(training.starts("a-seed0")) == 1 + 3 and len(training.starts("b-seed0")) == 1
    said = capsys.readouterr()
    assert "a-seed0 ended with exit code 1 at step 3: hello; started again" in said.out
    assert "a-seed0 ended with exit code 74 at step 3: error: out of luck; left as failed, see " in said.out
    assert said.err.startswith("error: 1 of 2 runs failed: a-seed0 (exit code 74); ") and said.err.count("\n") == 1


@pytest.mark.parametrize(("deeds", "starts", "code"), [("exit:64", 1, 64), ("exit:0", 3, 1), ("die:9", 3, 137)])
def test_a_run_without_hope_is_started_once_and_one_that_was_killed_or_ended_early_again(
    training: StudyTraining, deeds: str, starts: int, code: int
) -> None:
    training.plan(a=[["step:10"]], b=[[deeds]])
    with pytest.raises(SystemExit) as ended:
        go(training)
    assert ended.value.code == code and len(training.starts("b-seed0")) == starts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_handed_to_the_run_which_saves_and_the_same_command_goes_on(
    training: StudyTraining, number: signal.Signals
) -> None:
    training.plan(a=[["step:2", f"signal:{int(number)}", "wait", "step:4", "exit:75"], ["step:10"]], b=[["step:10"]])
    with pytest.raises(Stopped, match=f"{number.name} on rank 0, at step 4 of a-seed0; checkpoint .*step-00000004;"):
        go(training)
    assert not training.starts("b-seed0") and not (training.folder / "study" / "a-seed0" / "stop").exists()
    go(training)
    assert len(training.starts("a-seed0")) == 2 and len(training.starts("b-seed0")) == 1


def test_the_file_stop_in_the_folder_of_the_study_stops_it(
    training: StudyTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.supervision.stopping.LOOK_SECONDS", 0.0)
    training.plan(a=[["step:2", "wait", "exit:75"]], b=[["step:10"]])
    (training.folder / "study").mkdir()
    threading.Timer(0.1, (training.folder / "study" / "stop").touch).start()
    with pytest.raises(Stopped, match="study/stop was made"):
        go(training)
    assert not (training.folder / "study" / "stop").exists()


def test_a_run_that_has_outlived_its_study_is_waited_for(training: StudyTraining) -> None:
    """It holds the lock of its folder; a wish to stop of somebody who was killed is taken back at its start."""
    training.plan(a=[["wait", "step:10", "exit:0"]], b=[["step:10"]])
    run = plan_runs(training.config)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "stop").touch()
    orphan = start_training(training.config.start, run)
    assert not (run.folder / "stop").exists() and is_being_trained(run)
    held = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert str(run.folder / LOCK) not in held, "the lock would end with the study"
    with pytest.raises(BlockingIOError, match="a-seed0: another process trains this run"):
        start_training(training.config.start, run)
    threading.Timer(0.2, (run.folder / "stop").touch).start()
    go(training)
    assert orphan.wait() == 0 and len(training.starts("a-seed0")) == 1


def test_a_run_that_is_left_behind_is_asked_to_save_and_end(
    training: StudyTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.plan(a=[["wait", "exit:75"]])
    monkeypatch.setattr(Display, "show", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(training)
    run = plan_runs(training.config)[0]
    while is_being_trained(run):
        pass
    assert (run.folder / "stop").exists() and not (run.folder / "checkpoints").exists()


def test_a_study_is_trained_by_one_command_at_a_time(training: StudyTraining) -> None:
    with (
        claimed_folder(training.folder / "study"),
        pytest.raises(Claimed, match=f"study is being written by process {os.getpid()}"),
    ):
        go(training)


def test_a_run_that_was_started_by_hand_counts_as_being_trained(training: StudyTraining) -> None:
    run = plan_runs(training.config)[0]
    assert not is_being_trained(run)
    with claimed_folder(run.folder):
        assert is_being_trained(run)
    assert not is_being_trained(run)


def test_a_dry_run_shows_table_and_commands_and_starts_nothing(
    training: StudyTraining, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(training.folder / "study" / "a-seed0", step=10, saved=10)
    go(training, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["a", "0", "done"] and lines[2].split()[:3] == ["b", "0", "waiting"]
    assert [line for line in lines if "train.py" in line] == lines[3:] and "b-seed0" in lines[3]
    assert not (training.folder / "study" / "study.yaml").exists()


def test_the_page_in_mlflow_learns_how_it_ended(training: StudyTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(study_run, "open_parent", lambda config: told.append("RUNNING"))
    monkeypatch.setattr(study_run, "close_parent", lambda config, status: told.append(status))
    training.plan(a=[["exit:75"], ["exit:64"], ["step:10"]], b=[["step:10"]])
    for error in (Stopped, SystemExit):
        with pytest.raises(error):
            go(training)
    go(training)
    assert told == ["RUNNING", "KILLED", "RUNNING", "FAILED", "RUNNING", "FINISHED"]


@pytest.mark.parametrize("deeds", [["step:10", f"signal:{int(signal.SIGTERM)}"], ["step:2", "exit:75"]])
def test_a_signal_at_the_end_of_a_run_and_a_run_that_was_stopped_stop_the_study(
    training: StudyTraining, deeds: list[str]
) -> None:
    training.plan(a=[deeds], b=[["step:10"]])
    with pytest.raises(Stopped):
        go(training)
    assert not training.starts("b-seed0")


@pytest.mark.parametrize(("columns", "lines", "redraws"), [(50, 24, True), (80, 3, False)])
def test_on_a_terminal_a_table_that_fits_is_drawn_in_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, lines: int, redraws: bool
) -> None:
    monkeypatch.setattr(study_run, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, lines)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    display = Display()
    for state in (WAITING, RUNNING):
        display.show([row("a", state), row("b", WAITING)])
    said = capsys.readouterr().out
    assert ("\x1b[3F\x1b[J" in said) == redraws, "up by three lines, and the screen below is cleared"
    assert not redraws or max(len(line) for line in said.replace("\x1b[3F\x1b[J", "").splitlines()) < columns


def row(name: str, state: str, loss: str = "") -> tuple[str, ...]:
    return (name, "0", state, "1/10", "10.0 %", loss, loss, "", "")


def test_in_a_file_the_table_comes_when_a_state_changes_and_the_running_row_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display, written = Display(), []
    for loss, state, later in (("3.0", RUNNING, 0), ("2.5", RUNNING, 1), ("2.0", RUNNING, 61), ("1.5", FAILED, 1)):
        now += later
        display.show([row("a", state, loss), row("b", WAITING)])
        written.append(capsys.readouterr().out.splitlines())
    assert [len(lines) for lines in written] == [3, 0, 1, 3]
    assert "2.0" in written[2][0]
