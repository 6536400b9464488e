"""The outer loop that both stages share: take a step, record it, validate, save.

A stage supplies one optimiser step and one validation pass; the loop supplies position, schedule, record, progress line
and checkpoints. Step metrics stay on the device as tensors and are fetched every `log_every` steps in one reduction, so
that recording every step does not stall a GPU at every step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from training.checkpoint import Checkpoints, TrainState
from training.distributed import World, sum_over_ranks
from training.engine import Engine
from training.flops import FLOPS_PER_PFLOP
from training.optim import OptimizerConfig, learning_rate_factor, weight_decay_at
from training.tracking import MLflowView, Record, RunRecord, wall_time


class TrainingDiverged(ArithmeticError):
    """The loss is not a finite number; nothing of it was recorded or saved."""


@dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a run."""

    global_batch: int = 768
    epochs: float = 200.0
    log_every: int = 10  # steps between fetches of metrics; every step is recorded all the same
    validate_every: float = 10.0  # epochs
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2
    keep_at: tuple[float, ...] = ()  # shares of the run, in (0, 1], whose checkpoints are saved and never forgotten
    stop_after_steps: int = 0  # 0: run to the end; else leave, with a checkpoint, after this many steps in all

    def __post_init__(self) -> None:
        for name in ("global_batch", "epochs", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be positive")
        if self.stop_after_steps < 0:
            raise ValueError(f"loop.stop_after_steps is {self.stop_after_steps}; it must be 0 (off) or positive")
        for share in self.keep_at:
            if not 0 < share <= 1:
                raise ValueError(f"loop.keep_at has {share}; it holds shares of the run, above 0 and up to 1")

    def total_steps(self, num_samples: int) -> int:
        return max(1, math.ceil(self.epochs * num_samples / self.global_batch))

    def kept_steps(self, total_steps: int) -> frozenset[int]:
        """The steps whose checkpoints are never forgotten."""
        return frozenset(max(1, round(share * total_steps)) for share in self.keep_at)


@dataclass(frozen=True)
class StepContext:
    """Where a step stands: its first global stream position, progress in [0, 1), and this step's schedule."""

    samples_seen: int
    progress: float
    learning_rate: float
    weight_decay: float


class Batch(Protocol):
    """What a loader yields for one rank."""

    data: Tensor  # (B, L) codes, or (B, 3, H, H) images to be encoded here
    labels: Tensor  # (B,)
    positions: Tensor  # (B,) positions in the global stream of samples
    weights: Tensor  # (B,) 1, or 0 for padding in validation

    def to(self, device: torch.device) -> Batch: ...


class Stage(Protocol):
    """What a stage supplies to the loop."""

    engines: dict[str, Engine]
    flops_per_image: int
    tokens_per_image: int

    def train_step(self, batches: Iterator[Batch], context: StepContext) -> dict[str, Tensor]:
        """One optimiser step on this rank's micro-batches; metrics as device tensors, means over this rank's images."""

    def window_metrics(self) -> dict[str, Any]:
        """Metrics over the steps since the last call, already the same on all ranks. A collective."""

    def validate(self) -> dict[str, Any]:
        """Metrics over the whole validation set, already the same on all ranks. A collective."""

    def headline(self, record: Record) -> str:
        """The part of the progress line that only this stage knows."""


@dataclass
class Loop:
    """Runs a stage from its state to the end of the run."""

    stage: Stage
    config: LoopConfig
    optimizer: OptimizerConfig
    world: World
    num_samples: int  # in one epoch
    record: RunRecord
    view: MLflowView | None
    checkpoints: Checkpoints
    say: Callable[[str], None]
    _pending: list[tuple[Record, dict[str, Tensor]]] = field(default_factory=list)

    def run(self, state: TrainState, make_batches: Callable[[int], Iterator[Any]]) -> TrainState:
        """Train from `state` to the end. `make_batches(samples_seen)` yields this rank's batches from there on."""
        total = self.config.total_steps(self.num_samples)
        last = min(total, self.config.stop_after_steps or total)
        kept_steps = self.config.kept_steps(total)
        batches = TimedIterator(make_batches(state.samples_seen))
        self._window_start = time.monotonic()
        while state.step < last:
            self._take_step(state, total, batches)
            is_kept = state.step in kept_steps
            saving = state.step % self.config.checkpoint_every == 0 or state.step == last or is_kept
            validating = self._validation_is_due(state) or state.step == total
            if state.step % self.config.log_every == 0 or saving or validating:
                self._flush(total, batches.take_waited())
            if validating:
                self._validate(state)
            if saving:
                self.checkpoints.save(self.stage.engines, state, is_kept=is_kept)
            if validating or saving:
                self._window_start = time.monotonic()
        return state

    def _take_step(self, state: TrainState, total: int, batches: Iterator[Any]) -> None:
        context = self._context(state, total)
        metrics = self.stage.train_step(batches, context)
        state.step += 1
        state.samples_seen += self.config.global_batch
        self._pending.append((self._position(state, "train") | {"learning_rate": context.learning_rate}, metrics))

    def _context(self, state: TrainState, total: int) -> StepContext:
        progress = state.step / total
        peak = self.optimizer.peak_lr(self.config.global_batch)
        return StepContext(
            samples_seen=state.samples_seen,
            progress=progress,
            learning_rate=peak * learning_rate_factor(progress, self.optimizer),
            weight_decay=weight_decay_at(progress, self.optimizer),
        )

    def _position(self, state: TrainState, kind: str) -> Record:
        return {
            "kind": kind,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "epoch": state.samples_seen / self.num_samples,
            "pflop": state.samples_seen * self.stage.flops_per_image / FLOPS_PER_PFLOP,
        }

    @property
    def _scales_loss(self) -> bool:
        """With fp16's loss scaling an infinite gradient is no accident: the step is skipped and the scale lowered."""
        return any(engine.config.precision == "fp16" for engine in self.stage.engines.values())

    def _validation_is_due(self, state: TrainState) -> bool:
        every = self.config.validate_every * self.num_samples
        return state.samples_seen // every > (state.samples_seen - self.config.global_batch) // every

    def _flush(self, total: int, waited: float) -> None:
        """Fetch the metrics of the steps since the last flush in one reduction, and record each step."""
        positions, metrics = zip(*self._pending, strict=True)
        self._pending.clear()
        values = mean_over_ranks(list(metrics), self.world)
        for position, value in zip(positions, values, strict=True):
            self._refuse_divergence(position["step"], "loss", value["loss"])
            if not self._scales_loss:
                self._refuse_divergence(position["step"], "gradient norm", value["gradient_norm"])
        now = time.monotonic()
        seconds, self._window_start = now - self._window_start, now
        images = len(positions) * self.config.global_batch
        speed = {
            "images_per_second": images / seconds,
            "tokens_per_second": images * self.stage.tokens_per_image / seconds,
            "data_wait_share": waited / seconds,
            "time": wall_time(),
        }
        records = [position | value | speed for position, value in zip(positions, values, strict=True)]
        records[-1] |= self.stage.window_metrics()
        self._publish(records)
        for record in records:
            self.say(self._progress_line(record, total))

    def _refuse_divergence(self, step: int, name: str, loss: float | list[float]) -> None:
        """Raise TrainingDiverged, on all ranks alike, if a number of a step is not finite."""
        if not _is_finite(loss):
            newest = self.checkpoints.latest() or "none yet"
            raise TrainingDiverged(
                f"the {name} of step {step} is {loss}; the newest checkpoint is {newest}: "
                "resume from it with a lower optimizer.base_lr"
            )

    def _validate(self, state: TrainState) -> None:
        measured = self.stage.validate()
        for name, value in measured.items():
            self._refuse_divergence(state.step, f"validation {name}", value)
        record = self._position(state, "validation") | measured | {"time": wall_time()}
        self._publish([record])
        self.say(f"validation at step {state.step} | {self.stage.headline(record)}")

    def _publish(self, records: list[Record]) -> None:
        if self.world.is_rank_zero:
            self.record.write(records)
        if self.view is not None:
            self.view.notify()

    def _progress_line(self, record: Record, total: int) -> str:
        step = record["step"]
        eta = (total - step) * self.config.global_batch / record["images_per_second"]
        return (
            f"step {step}/{total} {step / total:.1%} | epoch {record['epoch']:.2f} | {self.stage.headline(record)} | "
            f"lr {record['learning_rate']:.1e} | gnorm {record['gradient_norm']:.2f} | "
            f"{record['images_per_second']:.1f} img/s {record['tokens_per_second']:.0f} tok/s | "
            f"data {record['data_wait_share']:.0%} | eta {format_duration(eta)}"
        )


class TimedIterator:
    """Passes items through and adds up the seconds spent waiting for them."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._waited = 0.0

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Any:
        start = time.monotonic()
        try:
            return next(self._items)
        finally:
            self._waited += time.monotonic() - start

    def take_waited(self) -> float:
        """Seconds waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited


def mean_over_ranks(metrics: list[dict[str, Tensor]], world: World) -> list[dict[str, Any]]:
    """Average equally named scalars and vectors over the ranks; one reduction and one copy to the host for all."""
    names = list(metrics[0])
    sizes = [metrics[0][name].numel() for name in names]
    flat = torch.stack([torch.cat([step[name].double().flatten() for name in names]) for step in metrics])
    rows = (sum_over_ranks(flat, world) / world.world_size).tolist()
    return [_unflatten(row, names, sizes, metrics[0]) for row in rows]


def _unflatten(row: list[float], names: list[str], sizes: list[int], like: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    start = 0
    for name, size in zip(names, sizes, strict=True):
        values[name] = row[start] if like[name].ndim == 0 else row[start : start + size]
        start += size
    return values


def _is_finite(value: float | list[float]) -> bool:
    return all(math.isfinite(number) for number in (value if isinstance(value, list) else [value]))


def format_duration(seconds: float) -> str:
    """1h02m, 3m20s or 12s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
