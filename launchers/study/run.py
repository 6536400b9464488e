"""`scaling_study.py run`: train all sizes of a study, one after the other, each as `launchers/train.py` would be typed.

The same command again goes on where the study was: what is done is skipped, what was stopped or has failed is resumed.
Every run is a process of its own that holds the lock of its folder. It outlives a study that is killed, and the next
study waits for it instead of starting a second one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers.setup.command_line import Command, refuse_several_ranks, say
from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.claim import claimed_folder
from data_pipeline.files.locks import take_lock
from launchers.setup.config_files import to_yaml
from launchers.setup.tables import table
from launchers.study.config import STUDY, StudyConfig
from launchers.study.page import close_parent, open_parent
from launchers.study.slurm import refuse_queued, submit
from launchers.study.state import (
    COLUMNS,
    DONE,
    FAILED,
    LOCK,
    RUNNING,
    WAITING,
    Follower,
    PlannedRun,
    is_being_trained,
    is_done,
    plan_runs,
    refuse_changed_settings,
    row_of,
    saved_step,
)
from training.checkpoints.commit import latest_checkpoint
from training.engine.distributed import World
from training.supervision.stopping import STOP_FILE, Stopped, Stopping

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
LOG = "log.txt"  # in a run's folder
HEADING = "=== "  # of each start in the log
LAST_BYTES = 4096  # of the log, in which a run says why it has ended
LOOK_SECONDS = 0.2
REDRAW_SECONDS = 1.0  # on a terminal
REPORT_SECONDS = 60.0  # elsewhere, between two lines on a run
HOPELESS = (64, 65, 70)  # exit codes that no second try mends: bad input, damaged data, divergence


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
    study = TrainedStudy(config, runs)
    if command.dry_run:
        say(table(COLUMNS, study.rows(), left=3))
        for run in study.unfinished():
            say(shlex.join(command_line(config.start, run)))
        return
    with claimed_folder(Path(config.folder)):
        refuse_queued(Path(config.folder))
        with atomic_file(Path(config.folder) / STUDY) as file:
            file.write(to_yaml(config).encode())
        open_parent(config)
        if config.slurm:
            submit(config, study.unfinished())
            return
        status = "FAILED"
        try:
            study.train()
            status = "FINISHED"
        except Stopped:
            status = "KILLED"
            raise
        finally:
            close_parent(config, status)


def command_line(start: Sequence[str], run: PlannedRun) -> list[str]:
    """Return the command that trains a run; programs of this Python's environment come first.

    Raises:
        ValueError: there is no such program.
    """
    if not start:
        raise ValueError("start is empty; give the command before launchers/train.py: deepspeed, or python")
    program = shutil.which(start[0], path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        raise ValueError(f"start is {' '.join(start)}, but {start[0]} is not found; install it, or start with python")
    return [program, *start[1:], str(TRAIN), *run.arguments]


def start_training(start: Sequence[str], run: PlannedRun) -> subprocess.Popen[bytes]:
    """Start a run, whose output goes to log.txt of its folder.

    Raises:
        BlockingIOError: another process trains it. OSError: it cannot be started.
    """
    command = command_line(start, run)
    lock = take_lock(run.folder / LOCK)
    if lock is None:
        raise BlockingIOError(f"{run.folder}: another process trains this run; wait for it")
    try:
        (run.folder / STOP_FILE).unlink(missing_ok=True)  # of somebody who was killed before it was read
        with (run.folder / LOG).open("ab") as log:
            log.write(f"{HEADING}{time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for the study, which hands it on once
            )
    finally:
        os.close(lock)


def last_words(run: PlannedRun) -> str:
    """Return why a run has ended, by its log: the last line that is an error, else the last line."""
    text = (run.folder / LOG).read_bytes()[-LAST_BYTES:].decode(errors="replace").rpartition(HEADING)[2]
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]  # the first is the heading's
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no word of its own"])[-1]


class Display:
    """Shows one table: redrawn in its place on a terminal; in a file, when a state changes."""

    def __init__(self) -> None:
        self._num_lines = 0  # that the next table replaces
        self._drawn_time = -REPORT_SECONDS
        self._states: list[str] = []

    def report(self, line: str) -> None:
        """Write a line that stays, above the table."""
        self._write(line, is_replaced=False)

    def show(self, rows: Sequence[Sequence[str]]) -> None:
        """Show the table if it is time to."""
        lines, states = table(COLUMNS, rows, left=3).splitlines(), [row[2] for row in rows]
        is_new, waited = states != self._states, time.monotonic() - self._drawn_time
        width, height = shutil.get_terminal_size()
        is_live = sys.stdout.isatty() and len(lines) < height
        if not is_new and waited < (REDRAW_SECONDS if is_live else REPORT_SECONDS):
            return
        if is_live:
            lines = [line[: width - 1] for line in lines]  # a line that is broken would count as two
        elif not is_new:
            lines = [line for line, state in zip(lines[1:], states, strict=True) if state == RUNNING]
        self._states, self._drawn_time = states, time.monotonic()
        self._write("\n".join(lines), is_replaced=is_live)

    def leave(self) -> None:
        """Let the table stay: others write below it from now on."""
        self._num_lines = 0

    def _write(self, text: str, *, is_replaced: bool) -> None:
        erase = f"\x1b[{self._num_lines}F\x1b[J" if self._num_lines else ""
        print(f"{erase}{text}", flush=True)
        self._num_lines = text.count("\n") + 1 if is_replaced else 0


class TrainedStudy:
    """The runs of a study while they are trained."""

    def __init__(self, config: StudyConfig, runs: Sequence[PlannedRun]) -> None:
        self.config = config
        self.runs = runs
        self._display = Display()
        self._stopping = Stopping(Path(config.folder), World())
        self._stop_reason = ""
        self._followers = {run.name: Follower(run) for run in runs}
        self._progress = {run.name: self._followers[run.name].look() for run in runs}
        self._states = {run.name: DONE if is_done(run, self._progress[run.name]) else WAITING for run in runs}
        self._codes: dict[str, int] = {}  # exit codes of the runs that have failed

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table."""
        return [row_of(run, self._states[run.name], self._progress[run.name]) for run in self.runs]

    def unfinished(self) -> list[PlannedRun]:
        """Return the runs that are not done."""
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
        self._display.show(self.rows())
        if self._codes:
            names = ", ".join(f"{name} (exit code {code})" for name, code in self._codes.items())
            print(
                f"error: {len(self._codes)} of {len(self.runs)} runs failed: {names}; each has a {LOG}, and the same "
                "command tries them again",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(next(iter(self._codes.values())) or 1)
        say(f"done: {len(self.runs)} runs; next: scaling_study.py fit {self.config.folder}")

    def _train(self, run: PlannedRun) -> None:
        """Start a run again and again until it is done or has failed."""
        idle_starts = 0
        while True:
            before = saved_step(run)
            self._wait(run, lambda: not is_being_trained(run))
            code = 0 if self._look(run) else self._train_once(run)
            if self._look(run):
                self._show(run, DONE)
                return
            if code == Stopped.exit_code or self._is_asked():
                self._show(run, WAITING)
                self._stopping.finished()
                newest = latest_checkpoint(run.folder / "checkpoints") or run.folder
                reason = self._stop_reason or f"{run.name} was stopped"
                raise Stopped(f"{reason}, at step {saved_step(run)} of {run.name}", newest)
            idle_starts = 0 if saved_step(run) > before else idle_starts + 1
            is_over = code in HOPELESS or idle_starts >= self.config.attempts
            self._display.report(
                f"{run.name} ended with exit code {code} at step {saved_step(run)}: {last_words(run)}; "
                + (f"left as failed, see {run.folder / LOG}" if is_over else "started again")
            )
            if is_over:
                self._codes[run.name] = code
                self._show(run, FAILED)
                return
            self._show(run, WAITING)

    def _train_once(self, run: PlannedRun) -> int:
        """Start a run, unless the study is asked to stop, and wait for its end; return its exit code, as a shell's."""
        if self._is_asked():
            return Stopped.exit_code
        process = start_training(self.config.start, run)
        try:
            self._wait(run, lambda: process.poll() is not None)
        finally:
            if process.poll() is None:
                (run.folder / STOP_FILE).touch()  # it is left behind: let it save and end by itself
            else:
                (run.folder / STOP_FILE).unlink(missing_ok=True)  # a wish that it has not seen
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _wait(self, run: PlannedRun, has_ended: Callable[[], bool]) -> None:
        """Show how a run goes on until it ends, and hand on to it what the study is asked."""
        while not has_ended():
            self._states[run.name] = RUNNING
            if self._is_asked():
                (run.folder / STOP_FILE).touch()  # reaches its ranks on whatever nodes they are
            self._look(run)
            self._display.show(self.rows())
            time.sleep(LOOK_SECONDS)

    def _is_asked(self) -> bool:
        """Return whether the study is asked to stop."""
        if not self._stop_reason and (reason := self._stopping.agreed()):
            self._stop_reason = reason
            self._display.leave()
        return bool(self._stop_reason)

    def _look(self, run: PlannedRun) -> bool:
        """Read how far a run has come; return whether it is done."""
        self._progress[run.name] = progress = self._followers[run.name].look()
        return is_done(run, progress)

    def _show(self, run: PlannedRun, state: str) -> None:
        self._states[run.name] = state
        self._display.show(self.rows())
