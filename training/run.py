"""A training run as one rank sees it: what its folder holds, who may end it, and who hears of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.files.atomic import atomic_file
from training.checkpoints.checkpoint import CheckpointFailed, Checkpoints, TrainState
from training.checkpoints.commit import folder_name, read_manifest
from training.engine.distributed import World, barrier, failing_together, gather_objects
from training.engine.engine import Engine
from training.supervision.bad_samples import BadSamples, NoBadSamples
from training.supervision.history import CHECKPOINT, LOST_OUTPUT, START, STOP, History
from training.supervision.stopping import Stopped, Stopping
from training.supervision.watch import Heartbeat
from training.tracking.follow import LivePage
from training.tracking.record import Record, RunRecord, wall_time
from training.tracking.redaction import lost_output


class RunFolderGone(OSError):
    """The run folder is no longer where this run began: it was moved, deleted or unmounted."""

    exit_code: ClassVar[int] = 74


CLOSING_SECONDS = 180.0  # more than an MLflow page is waited for


@dataclass
class Run:
    """One run. Rank 0 alone writes its record, history and page in MLflow; the other ranks call the same methods."""

    folder: Path
    world: World
    checkpoints: Checkpoints
    stopping: Stopping
    heartbeat: Heartbeat
    report: Callable[[str], None]  # silent on all ranks but 0
    page: LivePage | None = None  # on rank 0, where MLflow is on
    bad_samples: BadSamples | NoBadSamples = field(default_factory=NoBadSamples)
    place: tuple[int, int] | None = None  # what identifies the folder, from the start on
    noted_lost_output: bool = False

    @cached_property
    def record(self) -> RunRecord:
        """metrics.jsonl: what survives of the run."""
        return RunRecord(self.folder)

    @cached_property
    def history(self) -> History:
        """history.jsonl: what happened to the run."""
        return History(self.folder)

    @cached_property
    def first_start(self) -> float:
        """The time of the run's first start, in seconds since the epoch."""
        return self.history.first_start() or wall_time()

    def resume(self, engines: Mapping[str, Engine], *, config_yaml: str, init_from: str) -> TrainState:
        """Set the engines to the newest whole checkpoint, if there is one, and note the start. A collective.

        config_yaml: all settings, for RUN/config.yaml. init_from: where a fresh run's weights come from.

        Raises:
            DamagedCheckpoint, ValueError: see `Checkpoints.resume`.
        """
        state = self.checkpoints.resume(engines)
        changes: list[str] = []
        if state is None:
            self.report(f"starting in {self.folder}{f' from the weights of {init_from}' if init_from else ''}")
            state = TrainState()
        else:
            path = self.checkpoints.root / folder_name(state.step)
            changes = self._changes_since(path)
            self.report(f"resuming from {path}{'; changed: ' if changes else ''}{', '.join(changes)}")
        if self.world.is_rank_zero:
            self._begin_files(state.step, changes, config_yaml)
        return state

    def _changes_since(self, checkpoint: Path) -> list[str]:
        """The settings, and the number of ranks, that are no longer what they were."""
        ranks = read_manifest(checkpoint)["world_size"]
        changed_ranks = [f"ranks: {ranks} -> {self.world.world_size}"] if ranks != self.world.world_size else []
        return [*self.checkpoints.changed_settings(checkpoint), *changed_ranks]

    def _begin_files(self, step: int, changes: list[str], config_yaml: str) -> None:
        """Write the config, note the start, and take out of the record what will be recorded again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.folder / "config.yaml") as file:
            file.write(config_yaml.encode())
        self.place = self._place_now()
        self.history.note(START, step=step, world_size=self.world.world_size, changed=changes)
        takes_steps_again = any(record["step"] > step for record, _ in self.record.read_after())
        self.record.forget_after(step)
        if missing := self.record.missing_steps(step):
            some = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            self.report(f"warning: {self.record.path} has no records of {len(missing)} steps before this one: {some}")
        if self.page is not None and takes_steps_again and changes:  # they may get other values than MLflow has
            self.page.start_over()

    def _place_now(self) -> tuple[int, int] | None:
        """Return what identifies the folder, whatever its name; None if there is none."""
        try:
            found = self.folder.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def refuse_gone(self) -> None:
        """Raise RunFolderGone, on rank 0, if the folder is not the one that the run began in."""
        if self.world.is_rank_zero and self.place is not None and self._place_now() != self.place:
            raise RunFolderGone(
                f"{self.folder}: is no longer the folder in which this run began; it was moved, deleted or unmounted. "
                "Nothing was written in its place; put it back, and the same command goes on from its checkpoint"
            )

    def goodput(self, useful_seconds: float) -> float:
        """Return the share of the time since the first start that went into steps that survive, in [0, 1]."""
        seconds = max(wall_time() - self.first_start, useful_seconds)
        return useful_seconds / seconds if seconds else 0.0

    def publish(self, records: list[Record]) -> None:
        """Append records to metrics.jsonl, from where its page in MLflow takes them.

        Raises:
            RunFolderGone: the folder is no longer there, on rank 0.
        """
        if self.world.is_rank_zero and records:
            self.refuse_gone()
            self.record.write(records)
            self._note_lost_output()
        if self.page is not None:
            self.page.notify()

    def _note_lost_output(self) -> None:
        """Note once in the history that nobody hears this run any more."""
        if (lost := lost_output()) and not self.noted_lost_output:
            self.noted_lost_output = True
            self.history.note(LOST_OUTPUT, reason=lost)

    def note(self, event: str, **facts: Any) -> None:
        """Append an event to the history."""
        if self.world.is_rank_zero:
            self.history.note(event, **facts)

    def save(self, engines: Mapping[str, Engine], state: TrainState, *, is_kept: bool) -> None:
        """Commit a checkpoint, once all that it covers is recorded. A collective.

        Raises:
            CheckpointFailed: on all ranks; the earlier checkpoints are as they were.
            RankFailure, RunFolderGone: the folder is no longer there.
        """
        self.heartbeat.beat(f"saving step {state.step}")
        with failing_together(self.world):
            self.refuse_gone()
        try:
            with failing_together(self.world):
                if self.world.is_rank_zero:
                    self.record.flush()
        except (OSError, ValueError) as error:
            raise CheckpointFailed(f"step {state.step} is not saved, its records are not on disk: {error}") from None
        notes = {"mlflow_run_id": self.page.run_id if self.page is not None else None}
        path = self.checkpoints.save(engines, state, is_kept=is_kept, notes=notes)
        self.note(CHECKPOINT, step=state.step)
        self.report(f"saved {path}")

    def newest_checkpoint(self) -> str:
        """Say in words from where somebody who mends the run can go on."""
        return f"the newest checkpoint is {self.checkpoints.latest() or 'none yet'}"

    def recent_records(self, count: int) -> list[Record]:
        """The newest records, on all ranks as rank 0 has them. A collective."""
        records = (record for record, _ in self.record.read_after()) if self.world.is_rank_zero else []
        return gather_objects(list(deque(records, maxlen=count)), self.world)[0]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far, on all ranks as rank 0 has them. A collective."""
        return gather_objects(self.history.events(kind) if self.world.is_rank_zero else [], self.world)[0]

    def forget_after(self, step: int) -> None:
        """Take the steps after this one out of the record and of MLflow. A collective."""
        with failing_together(self.world):
            if self.world.is_rank_zero:
                self.record.forget_after(step)
        if self.page is not None:
            self.page.start_over()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the run behind the block: note who stopped it, and tell MLflow how it ended. A collective."""
        status = "FAILED"
        try:
            yield
            if self.world.is_rank_zero:
                self.record.flush()
            status = "FINISHED"
        except Stopped as stopped:
            status = "KILLED"
            self.note(STOP, checkpoint=stopped.checkpoint.name, reason=stopped.reason)  # of interest to job scripts
            raise
        finally:
            self.heartbeat.beat("closing the run", allow_seconds=CLOSING_SECONDS)
            if self.page is not None:
                self.page.close(status)
            if status == "KILLED":
                barrier(self.world)  # a launcher kills the others once the first rank has ended with a code but 0
