"""The runs of a scaling study, and what each of them is doing.

What a run is doing is read from its folder alone: from config.yaml, metrics.jsonl, the checkpoints, and the lock of the
process that trains it. So it does not matter who trains it, or where.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.files.claim import is_claimed
from data_pipeline.files.locks import take_lock
from data_pipeline.files.nested import flatten
from launchers.setup.config_files import load_config, nearest, read_settings
from launchers.setup.settings import TrainConfig
from launchers.study.config import StudyConfig, as_setting, study_name
from training.checkpoints.commit import candidates, structural_damage
from training.step_metrics import format_duration
from training.tracking.record import Place, Record, RunRecord

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
COLUMNS = ("size", "seed", "state", "step", "of run", "loss_last", "loss_avg", "img/s", "eta")
LOCK = ".run.lock"  # in a run's folder, held by the process that trains it
# what the runs of a study must have in common, or their losses would not be of the same thing
SHARED = ("tokenizer", "data.validation", "data.train", "model.patch_nums", "model.vocab_size", "model.num_classes")
# what may change while a study goes on, because it changes no loss by more than rounding
FREE = (
    *("run", "tracking.", "watch.", "data.workers", "data.cache.", "loop.log_every", "loop.checkpoint_every"),
    *("loop.keep_", "loop.max_failed_saves", "engine.zero_stage", "engine.micro_batch", "engine.reduce_bucket_size"),
    *("engine.prefetch_bucket_size", "engine.persistence_threshold", "engine.activation_checkpointing"),
    *("engine.attention", "engine.compile", "cluster."),
)


@dataclass(frozen=True)
class PlannedRun:
    """The training of one size with one seed."""

    size: str
    seed: int
    file: str  # the size's config
    folder: Path
    settings: tuple[str, ...]  # a.b=c, on top of the file
    train: TrainConfig  # what file and settings give

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @property
    def arguments(self) -> list[str]:
        """The arguments of launchers/train.py."""
        return ["--config", self.file, *self.settings]


def plan_runs(config: StudyConfig) -> tuple[PlannedRun, ...]:
    """Return all runs of a study in their order: every size with the first seed, then the repeated ones.

    Raises:
        ValueError, FileNotFoundError: the study or a config of its sizes is wrong, or they cannot be compared.
    """
    _refuse_unfit(config)
    runs = tuple(_plan_run(config, size, seed) for size, seed in config.run_names())
    for name in SHARED:
        _refuse_difference(name, {run.size: flatten(asdict(run.train))[name] for run in runs})
    return runs


def _refuse_unfit(config: StudyConfig) -> None:
    names = list(config.names())
    for what, given in (("sizes", config.sizes), ("seeds", config.seeds)):
        if not given:
            raise ValueError(f"{what} is empty; a study needs at least one")
    if len(names) < len(config.sizes) or len(set(config.seeds)) < len(config.seeds):
        raise ValueError("sizes or seeds name one twice; give each size a file name, and each seed a number of its own")
    for name in config.repeated:
        if name not in names:
            raise ValueError(f"repeated has '{name}', which is no size of this study; {nearest(name, names)}")
    if config.attempts < 1:
        raise ValueError(f"attempts is {config.attempts}; it must be 1 or more")
    for setting in config.settings:
        if setting.partition("=")[0].split(".")[0] in ("run", "seed", "tracking"):
            raise ValueError(f"settings has '{setting}'; folder, seeds and tracking of the study say that for its runs")


def _plan_run(config: StudyConfig, size: str, seed: int) -> PlannedRun:
    file, folder = config.names()[size], Path(config.folder) / f"{size}-seed{seed}"
    tracking = replace(config.tracking, study=config.tracking.study or study_name(config))
    own = {"run": str(folder), "seed": seed}
    own |= {f"tracking.{item.name}": getattr(tracking, item.name) for item in fields(tracking)}
    settings = (*config.settings, *(as_setting(name, value) for name, value in own.items()))
    train = load_config(TrainConfig, file, settings)
    if train.loop.stop_after_steps:
        raise ValueError(
            f"{size}: loop.stop_after_steps is {train.loop.stop_after_steps}; a study trains its sizes to their ends: "
            "leave it out"
        )
    return PlannedRun(size, seed, file, folder, settings, train)


def _refuse_difference(name: str, values: Mapping[str, Any]) -> None:
    first, *others = values
    for size in others:
        if values[size] != values[first]:
            raise ValueError(
                f"{name} is {values[first]} for {first}, {values[size]} for {size}; the sizes of a study are compared "
                "on the same tokens of the same data"
            )


def refuse_changed_settings(run: PlannedRun) -> None:
    """Raise ValueError if a run that has begun had another value of a setting that makes runs comparable."""
    recorded = read_settings(run.folder / "config.yaml")
    for name, now in flatten(asdict(run.train)).items():
        was = recorded.get(name, now)
        if was != now and not name.startswith(FREE):
            raise ValueError(
                f"{run.folder}: was trained with {name}={was}, now {now} is asked for; runs of one study must be "
                "comparable: set it back, remove the run folder, or choose another folder for the study"
            )


@dataclass(frozen=True)
class Progress:
    """The progress of a run by its record: steps taken and to be taken, the newest losses, the speed."""

    step: int = 0
    total_steps: int | None = None  # unknown before the first step
    loss_last: float | None = None  # of validation, of training before there is one
    loss_avg: float | None = None
    images_per_second: float | None = None
    is_validated: bool = False  # at the last step


class Follower:
    """Reads what is new in a run's record at every look."""

    def __init__(self, run: PlannedRun) -> None:
        self.run = run
        self._place: Place | None = None
        self._newest: dict[str, Record] = {}  # by kind

    def look(self) -> Progress:
        """Return how far the run has come now."""
        if not RunRecord.exists(self.run.folder):
            return Progress()
        record = RunRecord(self.run.folder)
        for entry, place in record.read_after(self._place) if self._place else record.read_after():
            self._newest[entry["kind"]], self._place = entry, place
        train, validation = self._newest.get("train", {}), self._newest.get("validation", {})
        if not train.get("epoch"):
            return Progress()
        measured = validation or train
        total = self.run.train.loop.total_steps(round(train["samples_seen"] / train["epoch"]))
        return Progress(
            step=train["step"],
            total_steps=total,
            loss_last=measured.get("loss_last"),
            loss_avg=measured.get("loss_avg"),
            images_per_second=train.get("images_per_second"),
            is_validated=validation.get("step") == train["step"] == total,
        )


def is_done(run: PlannedRun, progress: Progress) -> bool:
    """Return whether the run has come to its end: its last step is validated and saved."""
    return progress.is_validated and saved_step(run) == progress.step


def saved_step(run: PlannedRun) -> int:
    """Return the step of the newest whole checkpoint; 0 if there is none."""
    whole = (path for path in candidates(run.folder / "checkpoints") if not structural_damage(path))
    newest = next(whole, None)
    return int(newest.name.removeprefix("step-")) if newest else 0


def is_being_trained(run: PlannedRun) -> bool:
    """Return whether a process trains the run, which may be one that outlived the study that started it."""
    if is_claimed(run.folder):  # perhaps started by hand
        return True
    if not (run.folder / LOCK).exists():
        return False
    descriptor = take_lock(run.folder / LOCK)
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


def row_of(run: PlannedRun, state: str, progress: Progress) -> tuple[str, ...]:
    """Return a run as a row of the table whose columns are COLUMNS."""
    total, speed = progress.total_steps, progress.images_per_second if state == RUNNING else None
    left = ((total or 0) - progress.step) * run.train.loop.global_batch
    return (
        run.size,
        str(run.seed),
        state,
        f"{progress.step:,}" + (f"/{total:,}" if total else ""),
        f"{math.floor(1000 * progress.step / total) / 10:.1f} %" if total else "",
        "" if progress.loss_last is None else f"{progress.loss_last:.4f}",
        "" if progress.loss_avg is None else f"{progress.loss_avg:.4f}",
        f"{speed:,.1f}" if speed else "",
        format_duration(left / speed) if speed else "",
    )
