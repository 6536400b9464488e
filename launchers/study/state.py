"""The runs that a scaling study consists of, what each of them is doing, and the table that shows it.

What a run is doing is read from its folder alone: whoever trains it, and wherever, need not be asked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.files.nested import flatten
from launchers.setup.config_files import load_config, nearest, parse_yaml, read_settings
from launchers.setup.settings import TrainConfig
from launchers.study.config import StudyConfig
from training.checkpoints.commit import candidates, structural_damage
from training.step_metrics import format_duration
from training.tracking.record import Place, Record, RunRecord

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
COLUMNS = ("size", "seed", "state", "step", "of run", "loss_last", "loss_avg", "img/s", "eta")
TAIL_BYTES = 2**20  # of a record, read to know where its run stands: about a thousand steps
# what the runs of a study must have in common for their losses to be of the same thing
SHARED = ("tokenizer", "data.validation", "data.train", "model.patch_nums", "model.vocab_size", "model.num_classes")
# what may change while a study goes on, since it changes no loss by more than rounding
FREE = ("run", "tracking.", "watch.", "data.workers", "data.cache.", "loop.log_every", "loop.checkpoint_every")
FREE += ("loop.keep_", "loop.max_failed_saves", "engine.zero_stage", "engine.micro_batch", "engine.reduce_bucket_size")
FREE += ("engine.prefetch_bucket_size", "engine.persistence_threshold", "engine.activation_checkpointing")
FREE += ("engine.attention", "engine.compile", "cluster.")


@dataclass(frozen=True)
class PlannedRun:
    """One size trained with one seed."""

    size: str
    seed: int
    file: str  # the size's config
    folder: Path
    settings: tuple[str, ...]  # a.b=c, on top of the file
    train: TrainConfig  # what they give

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def arguments(self) -> list[str]:
        """Those of launchers/train.py."""
        return ["--config", self.file, *self.settings]


def plan_runs(config: StudyConfig) -> tuple[PlannedRun, ...]:
    """All runs of a study in their order: every size with the first seed, then the repeated ones with the others.

    Raises:
        ValueError, FileNotFoundError: the study or a config of its sizes is wrong, or they cannot be compared.
    """
    _refuse_unfit(config)
    runs = tuple(
        _plan_run(config, size, seed, file)
        for seed in config.seeds
        for size, file in config.names().items()
        if seed == config.seeds[0] or size in config.repeated
    )
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


def _plan_run(config: StudyConfig, size: str, seed: int, file: str) -> PlannedRun:
    folder = Path(config.folder) / f"{size}-seed{seed}"
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


def study_name(config: StudyConfig) -> str:
    """What a study is called where several are."""
    return Path(config.folder).resolve().name


def as_setting(name: str, value: Any) -> str:
    """name=value so that it is read back as that value."""
    text = str(value)
    if not isinstance(value, str):
        return f"{name}={json.dumps(value)}"
    try:
        is_itself = parse_yaml(text, name) == value
    except ValueError:
        is_itself = False
    return f"{name}={text if is_itself else json.dumps(value)}"


def _refuse_difference(name: str, values: Mapping[str, Any]) -> None:
    first, *others = values
    for size in others:
        if values[size] != values[first]:
            raise ValueError(
                f"{name} is {values[first]} for {first}, {values[size]} for {size}; the sizes of a study are compared "
                "on the same tokens of the same data"
            )


def refuse_changed_settings(run: PlannedRun) -> None:
    """Raise ValueError if a run that has begun was configured otherwise, in what makes runs comparable."""
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
    """Where a run stands by its record: steps taken and to be taken, the newest losses, the speed."""

    step: int = 0
    total_steps: int | None = None  # unknown before the first step
    loss_last: float | None = None  # of validation, of training before there is one
    loss_avg: float | None = None
    images_per_second: float | None = None
    is_validated: bool = False  # at the last step

    @property
    def share(self) -> float:
        return self.step / self.total_steps if self.total_steps else 0.0


@dataclass
class Follower:
    """Reads what is new in a run's record."""

    run: PlannedRun
    _record: RunRecord | None = None
    _place: Place = Place()
    _train: Record = field(default_factory=dict)
    _validation: Record = field(default_factory=dict)

    def look(self) -> Progress:
        """Where the run stands now."""
        if not RunRecord.exists(self.run.folder):
            return Progress()
        if self._record is None:
            self._record = RunRecord(self.run.folder)
            self._place = place_near_end(self._record.path)
        for record, self._place in self._record.read_after(self._place):
            if record["kind"] == "train":
                self._train = record
            elif record["kind"] == "validation":
                self._validation = record
        return self._progress()

    def _progress(self) -> Progress:
        if not self._train.get("epoch"):
            return Progress()
        step, measured = self._train["step"], self._validation or self._train
        num_samples = round(self._train["samples_seen"] / self._train["epoch"])
        total = self.run.train.loop.total_steps(num_samples)
        return Progress(
            step=step,
            total_steps=total,
            loss_last=measured.get("loss_last"),
            loss_avg=measured.get("loss_avg"),
            images_per_second=self._train.get("images_per_second"),
            is_validated=self._validation.get("step") == step == total,
        )


def place_near_end(path: Path) -> Place:
    """The place in a record from which its last lines can be read, at the beginning of a line."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size <= TAIL_BYTES:
            return Place()
        file.seek(status.st_size - TAIL_BYTES)
        file.readline()
        return Place(status.st_ino, file.tell())


def is_done(run: PlannedRun, progress: Progress) -> bool:
    """Whether the run has come to its end: its last step is validated and saved."""
    return progress.is_validated and saved_step(run) == progress.step


def saved_step(run: PlannedRun) -> int:
    """The step of the newest whole checkpoint; 0 if there is none."""
    whole = (path for path in candidates(run.folder / "checkpoints") if not structural_damage(path))
    newest = next(whole, None)
    return int(newest.name.removeprefix("step-")) if newest else 0


def row_of(run: PlannedRun, state: str, progress: Progress) -> tuple[str, ...]:
    """A run as a row of the table; COLUMNS are its columns."""
    speed = progress.images_per_second if state == RUNNING else None
    left = ((progress.total_steps or 0) - progress.step) * run.train.loop.global_batch
    return (
        run.size,
        str(run.seed),
        state,
        f"{progress.step:,}" + (f"/{progress.total_steps:,}" if progress.total_steps else ""),
        f"{math.floor(1000 * progress.share) / 10:.1f} %" if progress.total_steps else "",
        "" if progress.loss_last is None else f"{progress.loss_last:.4f}",
        "" if progress.loss_avg is None else f"{progress.loss_avg:.4f}",
        f"{speed:,.1f}" if speed else "",
        format_duration(left / speed) if speed else "",
    )


def draw_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equally wide columns under their names; the first three to the left, numbers to the right."""
    table = [COLUMNS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    return [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
