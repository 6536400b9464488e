"""`scaling_study.py run`: train all sizes of a study, one after the other, each as `launchers/train.py` would be typed.

The same command again goes on where the study was: what is done is skipped, what was stopped or has failed is resumed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from data_pipeline.files.atomic import atomic_file
from launchers.setup.command_line import Command, refuse_several_ranks, say
from launchers.setup.config_files import to_yaml
from launchers.study.config import STUDY, StudyConfig
from launchers.study.page import close_parent, open_parent
from launchers.study.process import (
    LOG,
    TrainingProcess,
    ask_to_stop,
    command_line,
    is_trained_elsewhere,
    last_words,
    take_lock,
)
from launchers.study.slurm import refuse_queued, submit
from launchers.study.state import (
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Follower,
    PlannedRun,
    Progress,
    draw_table,
    is_done,
    plan_runs,
    refuse_changed_settings,
    row_of,
    saved_step,
)
from training.checkpoints.model_on_disk import latest_checkpoint
from training.engine.distributed import World
from training.supervision.stopping import Stopped, Stopping

STUDY_LOCK = ".study.lock"
LOOK_SECONDS = 0.2
REDRAW_SECONDS = 1.0  # on a terminal
REPORT_SECONDS = 60.0  # elsewhere, between two lines on a run
STOPPED = 75
HOPELESS = (64, 65, 70)  # exit codes of what no second try mends: bad input, damaged data, divergence
ERASE = "\x1b[{}F\x1b[J"  # so many lines up, and all that is there


def launch_run(command: Command[StudyConfig]) -> None:
    """Train, or with `slurm` submit, what of a study is not done.

    Raises:
        ValueError, FileNotFoundError: the study, or what it names, is wrong; or settings of begun runs have changed.
        BlockingIOError: another command is training this study.
        Stopped: a signal or the file `stop` in the study's folder asked for it, or its run was stopped.
        SystemExit: runs have failed; with the exit code of the first.
    """
    refuse_several_ranks("scaling_study.py")
    config = command.config
    runs = plan_runs(config)
    for run in runs:
        refuse_changed_settings(run)
    study = TrainedStudy(config, runs, Display(sys.stdout))
    if command.dry_run:
        say("\n".join(draw_table(study.rows())))
        for run in study.unfinished():
            say(shlex.join(command_line(config.start, run)))
        return
    with hold(Path(config.folder)):
        refuse_queued(Path(config.folder))
        with atomic_file(Path(config.folder) / STUDY) as file:
            file.write(to_yaml(config).encode())
        open_parent(config)
        if config.slurm:
            submit(config, study.unfinished())
        else:
            train(config, study)


def train(config: StudyConfig, study: TrainedStudy) -> None:
    """Train what is not done, and show in MLflow how that ended."""
    status = "FAILED"
    try:
        study.train()
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        close_parent(config, status)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep others from training a study here at the same time."""
    lock = take_lock(folder / STUDY_LOCK)
    if lock is None:
        raise BlockingIOError(f"{folder}: another scaling_study.py trains this study; wait for it, or stop it")
    try:
        yield
    finally:
        os.close(lock)


@dataclass
class Display:
    """One table, drawn over and over in its place on a terminal; in a file it comes when a state changes."""

    stream: TextIO
    _drawn_lines: int = 0
    _drawn_time: float = -REPORT_SECONDS
    _states: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """A line that stays, above the table."""
        self._erase()
        self._write(text)

    def show(self, rows: Sequence[Sequence[str]]) -> None:
        """Show the table if it is time to; the columns are those of study_state.COLUMNS."""
        lines, states = draw_table(rows), [row[2] for row in rows]
        is_new, waited = states != self._states, time.monotonic() - self._drawn_time
        width, height = shutil.get_terminal_size()
        is_live = self.stream.isatty() and len(lines) < height
        if not is_new and waited < (REDRAW_SECONDS if is_live else REPORT_SECONDS):
            return
        if is_live:
            self._erase()
            lines = [line[: width - 1] for line in lines]  # a line that is broken would count as two
            self._drawn_lines = len(lines)
        elif not is_new:
            lines = [line for line, state in zip(lines[1:], states, strict=True) if state == RUNNING]
        self._states, self._drawn_time = states, time.monotonic()
        self._write("\n".join(lines))

    def leave(self) -> None:
        """What is written from now on comes below the table: others write too."""
        self._drawn_lines = 0

    def _erase(self) -> None:
        if self._drawn_lines:
            self.stream.write(ERASE.format(self._drawn_lines))
        self._drawn_lines = 0

    def _write(self, text: str) -> None:
        self.stream.write(f"{text}\n")
        self.stream.flush()


class TrainedStudy:
    """The runs of a study while they are trained."""

    def __init__(self, config: StudyConfig, runs: Sequence[PlannedRun], display: Display) -> None:
        self.config = config
        self.runs = runs
        self.display = display
        self._stopping = Stopping(Path(config.folder), World())
        self._stop_reason = ""
        self._followers = {run.name: Follower(run) for run in runs}
        self._progress = {run.name: follower.look() for run, follower in zip(runs, self._followers.values())}
        self._states = {run.name: DONE if is_done(run, self._progress[run.name]) else WAITING for run in runs}
        self._codes: dict[str, int] = {}  # of those that have failed

    def rows(self) -> list[tuple[str, ...]]:
        return [row_of(run, self._states[run.name], self._progress[run.name]) for run in self.runs]

    def unfinished(self) -> list[PlannedRun]:
        return [run for run in self.runs if self._states[run.name] != DONE]

    def train(self) -> None:
        """Train what is not done. See `launch_run` for what is raised."""
        self._stopping.install()
        try:
            for run in self.unfinished():
                self._train(run)
            self._stopping.finished()
        finally:
            self._stopping.remove()
        self.display.show(self.rows())
        self._tell_the_end()

    def _train(self, run: PlannedRun) -> None:
        """Start a run until it is done or has failed."""
        idle_starts = 0
        while self._states[run.name] not in (DONE, FAILED):
            before = saved_step(run)
            self._await(run, lambda: not is_trained_elsewhere(run))
            code = self._train_once(run) if not self._look(run) else 0
            if self._look(run):
                self._change(run, DONE)
            elif code == STOPPED or self._is_asked():
                self._change(run, WAITING)
                self._stop(run)
            else:
                idle_starts = 0 if saved_step(run) > before else idle_starts + 1
                self._judge(run, code, idle_starts)

    def _train_once(self, run: PlannedRun) -> int:
        """Start a run, unless the study is asked to stop, and wait for its end; its exit code."""
        if self._is_asked():
            return STOPPED
        process = TrainingProcess(self.config.start, run)
        try:
            self._await(run, lambda: process.exit_code() is not None)
        finally:
            process.close()
        code = process.exit_code()
        assert code is not None, "waited for"
        return code

    def _await(self, run: PlannedRun, has_ended: Callable[[], bool]) -> None:
        """Show how a run goes on until it ends, and hand on what the study is asked."""
        while not has_ended():
            self._states[run.name] = RUNNING
            if self._is_asked():
                ask_to_stop(run)
            self._look(run)
            self.display.show(self.rows())
            time.sleep(LOOK_SECONDS)

    def _is_asked(self) -> bool:
        """Whether the study is asked to stop."""
        if not self._stop_reason and (reason := self._stopping.agreed()):
            self._stop_reason = reason
            self.display.leave()
        return bool(self._stop_reason)

    def _look(self, run: PlannedRun) -> bool:
        """Read how far a run has come; whether it is done."""
        progress: Progress = self._followers[run.name].look()
        self._progress[run.name] = progress
        return is_done(run, progress)

    def _change(self, run: PlannedRun, state: str) -> None:
        self._states[run.name] = state
        self.display.show(self.rows())

    def _judge(self, run: PlannedRun, code: int, idle_starts: int) -> None:
        """Say how a run has ended too early, and whether it is tried again."""
        is_over = code in HOPELESS or idle_starts >= self.config.attempts
        what = f"{run.name} ended with exit code {code} at step {saved_step(run)}: {last_words(run)}"
        again = f"left as failed, see {run.folder / LOG}" if is_over else "started again"
        self.display.note(f"{what}; {again}")
        if is_over:
            self._codes[run.name] = code
        self._change(run, FAILED if is_over else WAITING)

    def _stop(self, run: PlannedRun) -> None:
        """Leave, as asked."""
        self._stopping.finished()
        reason = self._stop_reason or f"{run.name} was stopped"
        newest = latest_checkpoint(run.folder / "checkpoints") or run.folder
        raise Stopped(f"{reason}, at step {saved_step(run)} of {run.name}", newest)

    def _tell_the_end(self) -> None:
        if not self._codes:
            say(f"done: {len(self.runs)} runs; next: scaling_study.py fit {self.config.folder}")
            return
        names = ", ".join(f"{name} (exit code {code})" for name, code in self._codes.items())
        print(
            f"error: {len(self._codes)} of {len(self.runs)} runs failed: {names}; each has a {LOG}, and the same "
            "command tries them again",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(next(iter(self._codes.values())) or 1)
