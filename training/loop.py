"""The outer loop that both stages share: take a step, record it, validate, save.

A stage supplies one optimiser step and one validation pass; the loop supplies position, schedule, record, progress line
and checkpoints. Step metrics stay on the device as tensors and are fetched every `log_every` steps in one reduction, so
that recording every step does not stall a GPU at every step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.accounting import FLOPS_PER_PFLOP
from training.checkpoints.checkpoint import CheckpointFailed, Checkpoints, CheckpointsFailing, TrainState
from training.engine.distributed import World, agree_on_error, gather_objects
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig, learning_rate_factor, weight_decay_at
from training.seams import reach
from training.stage import Stage, StepContext
from training.step_metrics import TimedIterator, mean_over_ranks, name_some, progress_line, speed_of
from training.supervision.bad_samples import BadSamples, NoBadSamples
from training.supervision.divergence import DivergenceConfig, DivergenceGuard, RollBack, TrainingDiverged, is_finite
from training.supervision.history import CHECKPOINT, ROLL_BACK, History
from training.supervision.stopping import Stopped, Stopping
from training.supervision.watch import Heartbeat
from training.tracking.mlflow_view import MLflowView
from training.tracking.record import Record, RunRecord, wall_time


@dataclass
class _PendingStep:
    """A step whose metrics are still on the device: what is known of it, its metrics here, the sample behind it."""

    position: Record
    metrics: dict[str, Tensor]
    next_sample: int


@dataclass
class Loop:
    """Runs a stage from its state to the end of the run.

    `name_samples` tells this rank's samples in the step that starts at a stream position. Without `stopping` and
    `heartbeat` nobody asks the run to stop, and nobody watches it.
    """

    stage: Stage
    config: LoopConfig
    optimizer: OptimizerConfig
    world: World
    num_samples: int  # in one epoch
    record: RunRecord
    view: MLflowView | None
    checkpoints: Checkpoints
    say: Callable[[str], None]
    history: History
    divergence: DivergenceConfig = DivergenceConfig()
    stopping: Stopping | None = None
    heartbeat: Heartbeat | None = None
    name_samples: Callable[[int], list[str]] = lambda first: []
    bad_samples: BadSamples | NoBadSamples = NoBadSamples()
    _pending: list[_PendingStep] = field(default_factory=list)
    _failed_saves: int = 0

    def run(self, state: TrainState, make_batches: Callable[[int], Iterator[Any]]) -> TrainState:
        """Train from `state` to the end. `make_batches(samples_seen)` yields this rank's batches from there on.

        Raises:
            Stopped: somebody asked for it; a checkpoint is committed.
            TrainingDiverged: it makes no sense to go on.
            CheckpointsFailing: progress cannot be saved.
        """
        self.bad_samples.refuse_too_many()
        total = self.config.total_steps(self.num_samples)
        last = min(total, self.config.stop_after_steps or total)
        self._first_start = self.history.first_start() or wall_time()
        self._guard = DivergenceGuard(self.divergence, scales_loss=self._scales_loss)
        self._roll_backs = self._earlier_roll_backs()
        self._has_checkpoint = state.step > 0
        while True:
            self._guard.remember(self._go_on(state, total))
            batches = TimedIterator(make_batches(state.samples_seen), self._beat)
            try:
                self._take_steps(state, last, total, batches)
                break
            except RollBack as event:
                batches.close()
                state = self._roll_back(state, event)
        if self.stopping is not None:
            self.stopping.finished()
        return state

    def _take_steps(self, state: TrainState, last: int, total: int, batches: TimedIterator) -> None:
        kept_steps = self.config.kept_steps(total)
        self._window_start = time.monotonic()
        while state.step < last:
            self._take_step(state, total, batches)
            reason = self.stopping.agreed() if self.stopping else ""
            is_kept = state.step in kept_steps
            is_last = bool(reason) or state.step == last
            saving = state.step % self.config.checkpoint_every == 0 or is_last or is_kept
            validating = not reason and self._validation_is_due(state, total)
            if state.step % self.config.log_every == 0 or saving or validating:
                self._flush(state, total, batches.take_waited())
            if validating:
                self._validate(state)
            if saving:
                self._save(state, is_kept=is_kept, must_succeed=is_last)
            if reason:
                self._stop(state, reason)
            if validating or saving:
                self._window_start = time.monotonic()

    def _go_on(self, state: TrainState, total: int) -> list[Record]:
        """Step over what was rolled back, and make up for a validation that a stop has left out; the newest records."""
        state.samples_seen = max([state.samples_seen, *(after for to, after in self._roll_backs if to == state.step)])
        window = self._recorded_window()
        validated = any(record["kind"] == "validation" and record["step"] == state.step for record in window)
        if state.step > 0 and self._validation_is_due(state, total) and not validated:
            self._validate(state)
        return window

    def _beat(self, doing: str, *, allow_seconds: float | None = None) -> None:
        if self.heartbeat is not None:
            self.heartbeat.beat(doing, allow_seconds=allow_seconds)

    def _take_step(self, state: TrainState, total: int, batches: Iterator[Any]) -> None:
        self._beat(f"step {state.step + 1}")
        reach("loop.step")
        context = self._context(state, total)
        metrics = self.stage.train_step(batches, context)
        state.step += 1
        state.samples_seen += self.config.global_batch
        if self.heartbeat is not None:
            self.heartbeat.end_start()
        position = self._position(state, "train") | {"learning_rate": context.learning_rate}
        self._pending.append(_PendingStep(position, metrics, state.samples_seen))

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
            "pflop": state.step * self.config.global_batch * self.stage.flops_per_image / FLOPS_PER_PFLOP,
        }

    @property
    def _scales_loss(self) -> bool:
        """With fp16's loss scaling an infinite gradient is no accident: the step is skipped and the scale lowered."""
        return any(engine.config.precision == "fp16" for engine in self.stage.engines.values())

    def _validation_is_due(self, state: TrainState, total: int) -> bool:
        return self.config.validation_is_due(state.step, total_steps=total, num_samples=self.num_samples)

    def _flush(self, state: TrainState, total: int, waited: float) -> None:
        """Fetch the metrics of the steps since the last flush in one reduction; judge and record each step."""
        pending, self._pending = self._pending, []
        values = mean_over_ranks([step.metrics for step in pending], self.world)
        now = time.monotonic()
        seconds, self._window_start = now - self._window_start, now
        state.useful_seconds += seconds * sum(not self._guard.problem_of(value) for value in values) / len(values)
        speed = speed_of(len(pending) * self.config.global_batch, self.stage.tokens_per_image, seconds, waited)
        goodput = state.useful_seconds / max(wall_time() - self._first_start, state.useful_seconds)
        speed |= {"goodput": goodput, "time": wall_time()}
        records = [step.position | value | speed for step, value in zip(pending, values, strict=True)]
        records[-1] |= self.stage.window_metrics() | self.bad_samples.share(self.say)
        sound: list[Record] = []
        try:
            for step, record in zip(pending, records, strict=True):
                self._judge(step, record)
                sound.append(record)
        finally:  # also the steps before one that ends the run or is taken back
            self._publish(sound)
            for record in sound:
                self.say(progress_line(record, total, self.config.global_batch, self.stage.headline(record)))
        self.bad_samples.refuse_too_many()

    def _judge(self, step: _PendingStep, record: Record) -> None:
        blame = self._blame(step) if self._guard.problem_of(record) else ""
        try:
            warning = self._guard.judge(record, step.next_sample, blame, can_roll_back=self._has_checkpoint)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{error}; {self._way_on()}") from None
        if warning:
            self.say(f"warning: {warning}")

    def _blame(self, step: _PendingStep) -> str:
        """The ranks whose own loss is not finite, and their samples; the same on all ranks. A collective."""
        bad = not bool(torch.isfinite(step.metrics["loss"]).all())
        names = self._names(step.next_sample - self.config.global_batch) if bad else []
        said = gather_objects((bad, names), self.world)
        blamed = [(rank, names) for rank, (bad, names) in enumerate(said) if bad]
        if not blamed:
            return "the loss of every rank is finite, the gradient is not"
        return "; ".join(f"rank {rank}, {name_some(names)}" for rank, names in blamed)

    def _names(self, first: int) -> list[str]:
        try:
            return self.name_samples(first)
        except (OSError, ValueError) as error:  # the others wait for what this rank has to say
            return [f"from position {first} on, which cannot be read ({error})"]

    def _way_on(self) -> str:
        newest = self.checkpoints.latest() or "none yet"
        return f"the newest checkpoint is {newest}: resume from it with a lower optimizer.base_lr"

    def _recorded_window(self) -> list[Record]:
        """The newest records, on all ranks as rank 0 has them."""
        records = (record for record, _ in self.record.read_after()) if self.world.is_rank_zero else []
        return gather_objects(list(deque(records, maxlen=2 * self.divergence.spike_window)), self.world)[0]

    def _earlier_roll_backs(self) -> list[tuple[int, int]]:
        """The roll backs before this start, on all ranks as rank 0 knows them: step returned to, first sample after."""
        events = self.history.events(ROLL_BACK) if self.world.is_rank_zero else []
        return gather_objects([(event["to"], event["next_sample"]) for event in events], self.world)[0]

    def _roll_back(self, state: TrainState, event: RollBack) -> TrainState:
        """Return to the newest checkpoint, with the data behind the step that went wrong."""
        self._pending.clear()
        self._beat("rolling back", allow_seconds=self.heartbeat and self.heartbeat.config.start_seconds)
        restored = self.checkpoints.resume(self.stage.engines)
        earlier = sum(to == restored.step for to, _ in self._roll_backs)
        if earlier == self.divergence.max_roll_backs:
            raise TrainingDiverged(f"{event}, after {earlier} roll backs to step {restored.step}; {self._way_on()}")
        self._roll_backs.append((restored.step, event.next_sample))
        skipped = event.next_sample - restored.samples_seen
        self.say(f"rolled back to step {restored.step}, stepping over {skipped} samples: {event}")
        problem = None
        if self.world.is_rank_zero:
            facts = {"step": state.step, "to": restored.step, "next_sample": event.next_sample, "samples": skipped}
            self.history.note(ROLL_BACK, **facts, reason=str(event))
            try:
                self.record.forget_after(restored.step)
            except OSError as error:
                problem = error
        agree_on_error(problem, self.world)
        if self.view is not None:
            self.view.start_over()
        return restored

    def _save(self, state: TrainState, *, is_kept: bool, must_succeed: bool) -> None:
        self._beat(f"saving step {state.step}")
        try:
            notes = {"mlflow_run_id": self.view.run_id if self.view is not None else None}
            path = self.checkpoints.save(self.stage.engines, state, is_kept=is_kept, notes=notes)
        except CheckpointFailed as failure:
            self._failed_saves += 1
            if must_succeed or self._failed_saves >= self.config.max_failed_saves:
                raise CheckpointsFailing(f"{failure}; {self._failed_saves} in a row failed") from None
            self.say(f"warning: {failure}; training goes on")
            return
        self._failed_saves = 0
        self._has_checkpoint = True
        if self.world.is_rank_zero:
            self.history.note(CHECKPOINT, step=state.step)
        self.say(f"saved {path}")

    def _stop(self, state: TrainState, reason: str) -> None:
        self.stopping.finished()
        raise Stopped(reason, self.checkpoints.latest())

    def _validate(self, state: TrainState) -> None:
        self._beat(f"validation at step {state.step}")
        measured = self.stage.validate(self._beat) | self.bad_samples.share(self.say)
        for name, value in measured.items():
            if not is_finite(value):
                raise TrainingDiverged(f"validation {name} of step {state.step} is {value}; {self._way_on()}")
        record = self._position(state, "validation") | measured | {"time": wall_time()}
        self._publish([record])
        self.say(f"validation at step {state.step} | {self.stage.headline(record)}")
        self.bad_samples.refuse_too_many()

    def _publish(self, records: list[Record]) -> None:
        if self.world.is_rank_zero and records:
            self.record.write(records)
        if self.view is not None:
            self.view.notify()
