"""`scaling_study.py run`: what is done is skipped, what ends early is started again, a wish to stop is handed on."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from study_training import StudyTraining, write_run
from tiny import command

from launchers.setup.config_files import load_config
from launchers.study import run as study_run
from launchers.study.config import StudyConfig
from launchers.study.process import TrainingProcess, take_lock
from launchers.study.run import STUDY_LOCK, Display, launch_run
from launchers.study.state import FAILED, RUNNING, WAITING, plan_runs
from training.supervision.stopping import Stopped


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyTraining:
    return StudyTraining(tmp_path, monkeypatch)


def go(training: StudyTraining, **options: Any) -> None:
    launch_run(command(training.config, **options))


def test_every_size_is_trained_once_in_its_order(training: StudyTraining, capsys: pytest.CaptureFixture[str]) -> None:
    go(training)
    assert [len(training.starts(name)) for name in ("a-seed0", "b-seed0")] == [1, 1]
    said = capsys.readouterr().out
    assert "done: 2 runs; next: scaling_study.py fit" in said
    assert re.findall(r"^(\w) +0 +done +10/10 +100\.0 %", said.splitlines()[-2] + "\n" + said, re.MULTILINE)
    assert said.index("a     0     running") < said.index("b     0     running")
    assert load_config(StudyConfig, str(training.folder / "study" / "study.yaml")) == training.config


def test_what_is_done_is_skipped(training: StudyTraining) -> None:
    go(training)
    training.change(seeds=(0, 1), repeated=("b",))
    go(training)
    assert [len(training.starts(name)) for name in ("a-seed0", "b-seed0", "b-seed1")] == [1, 1, 1]


def test_a_study_may_grow_but_its_begun_runs_stay_what_they_were(training: StudyTraining) -> None:
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
    training.plan(a=[["step:3", "exit:1"], ["say:error: out of luck", "exit:74"]], b=[["step:10"]])
    with pytest.raises(SystemExit) as ended:
        go(training)
    assert ended.value.code == 74
    assert len(training.starts("a-seed0")) == 1 + 3 and len(training.starts("b-seed0")) == 1
    said = capsys.readouterr()
    assert "a-seed0 ended with exit code 74 at step 3: error: out of luck; left as failed, see " in said.out
    assert said.err.startswith("error: 1 of 2 runs failed: a-seed0 (exit code 74); ") and said.err.count("\n") == 1


@pytest.mark.parametrize("code", [64, 65, 70])
def test_what_no_second_try_mends_is_not_tried_again(training: StudyTraining, code: int) -> None:
    training.plan(a=[["step:10"]], b=[[f"exit:{code}"]])
    with pytest.raises(SystemExit) as ended:
        go(training)
    assert ended.value.code == code and len(training.starts("b-seed0")) == 1


def test_a_run_that_ends_well_before_its_last_step_has_failed(training: StudyTraining) -> None:
    training.plan(a=[["step:9"], ["exit:0"]], b=[["step:10"]])
    with pytest.raises(SystemExit) as ended:
        go(training)
    assert ended.value.code == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_handed_to_the_run_which_saves(training: StudyTraining, number: signal.Signals) -> None:
    training.plan(a=[["step:2", f"signal:{int(number)}", "wait", "step:4", "exit:75"], ["step:10"]], b=[["step:10"]])
    with pytest.raises(Stopped, match=f"{number.name} on rank 0, at step 4 of a-seed0; checkpoint .*step-00000004;"):
        go(training)
    assert not training.starts("b-seed0") and not (training.folder / "study" / "a-seed0" / "stop").exists()
    if number == signal.SIGINT:  # the same command again goes on
        go(training)
        assert len(training.starts("a-seed0")) == 2 and len(training.starts("b-seed0")) == 1


def test_a_signal_that_comes_with_the_end_of_a_run_stops_before_the_next(training: StudyTraining) -> None:
    training.plan(a=[["step:10", f"signal:{int(signal.SIGTERM)}"]], b=[["step:10"]])
    with pytest.raises(Stopped):
        go(training)
    assert not training.starts("b-seed0")


def test_the_file_stop_in_the_folder_of_the_study_is_a_wish_as_well(
    training: StudyTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.supervision.stopping.LOOK_SECONDS", 0.0)
    training.plan(a=[["step:2", "wait", "exit:75"]], b=[["step:10"]])
    (training.folder / "study").mkdir()
    threading.Timer(0.2, (training.folder / "study" / "stop").touch).start()
    with pytest.raises(Stopped, match="study/stop was made"):
        go(training)
    assert not (training.folder / "study" / "stop").exists()


def test_a_run_that_was_stopped_stops_the_study(training: StudyTraining) -> None:
    training.plan(a=[["step:2", "exit:75"]], b=[["step:10"]])
    with pytest.raises(Stopped, match="a-seed0 was stopped, at step 2"):
        go(training)
    assert not training.starts("b-seed0")


def test_a_run_that_has_outlived_its_study_is_waited_for(training: StudyTraining) -> None:
    training.plan(a=[["wait", "step:10", "exit:0"]], b=[["step:10"]])
    run = plan_runs(training.config)[0]
    orphan = TrainingProcess(training.config.start, run)
    threading.Timer(0.3, (run.folder / "stop").touch).start()
    go(training)
    assert orphan.exit_code() == 0 and len(training.starts("a-seed0")) == 1


def test_a_study_is_trained_by_one_command_at_a_time(training: StudyTraining) -> None:
    lock = take_lock(training.folder / "study" / STUDY_LOCK)
    assert lock is not None
    with pytest.raises(BlockingIOError, match="study: another scaling_study.py trains this study"):
        go(training)
    os.close(lock)
    go(training)


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What a terminal shows after all that was written."""
        lines: list[str] = [""]
        for part in re.split(r"(\x1b\[\d+F\x1b\[J|\n)", self.getvalue()):
            if part == "\n":
                lines.append("")
            elif part.startswith("\x1b"):
                lines = [*lines[: -1 - int(part[2 : part.index("F")])], ""]
            else:
                lines[-1] += part
        return lines[:-1]


def row(name: str, state: str, loss: str = "") -> tuple[str, ...]:
    return (name, "0", state, "1/10", "10.0 %", loss, loss, "", "")


def test_on_a_terminal_one_table_is_drawn_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_run, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((100, 24)))
    terminal = Terminal()
    display = Display(terminal)
    for loss in ("3.0", "2.0", "1.0"):
        display.show([row("a", RUNNING, loss), row("b", WAITING)])
    display.note("a failed")
    display.show([row("a", FAILED, "0.5"), row("b", RUNNING)])
    screen = terminal.screen()
    assert screen[0] == "a failed" and len(screen) == 4
    assert screen[2].split()[2] == "failed" and "0.5" in screen[2] and "1.0" not in "\n".join(screen)


def test_a_table_that_does_not_fit_a_terminal_is_not_drawn_over_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_run, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((30, 3)))
    terminal = Terminal()
    for state in (WAITING, RUNNING):
        Display(terminal).show([row("a", state), row("b", WAITING)])
    assert "\x1b" not in terminal.getvalue()
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((30, 24)))
    narrow = Terminal()
    Display(narrow).show([row("a", RUNNING)])
    assert max(map(len, narrow.screen())) == 29


def test_in_a_file_the_table_comes_when_a_state_changes_and_the_running_row_once_a_minute() -> None:
    file = io.StringIO()
    display = Display(file)
    for _ in range(3):
        display.show([row("a", RUNNING, "3.0"), row("b", WAITING)])
    assert len(file.getvalue().splitlines()) == 3
    display._drawn_time = time.monotonic() - 61
    display.show([row("a", RUNNING, "2.0"), row("b", WAITING)])
    assert len(file.getvalue().splitlines()) == 4 and "2.0" in file.getvalue().splitlines()[-1]
    display.show([row("a", FAILED), row("b", RUNNING)])
    assert len(file.getvalue().splitlines()) == 7
