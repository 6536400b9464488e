"""The outer loop that both stages share: take a step, record it, validate, save.

A stage supplies one optimiser step and one validation pass; the loop supplies position, schedule, record, progress line
and checkpoints. Step metrics stay on the device as tensors and are fetched every `log_every` steps in one reduction, so
that recording every step does not stall a GPU at every step.
"""

from __future__ import annotations

from typing import NoReturn

from training.accounting import FLOPS_PER_PFLOP
from training.checkpoints.checkpoint import CheckpointFailed, CheckpointsFailing, TrainState
from training.recovery import Recovery
from training.run import Run
from training.schedule import Schedule
from training.stage import Stage, TrainingData
from training.step_metrics import Step, StepWindow, TimedIterator, progress_line, speed_of
from training.supervision.divergence import DivergenceConfig, RollBack, is_finite
from training.supervision.stopping import Stopped
from training.tracking.record import Record, wall_time


class Loop:
    """Drives a stage to the end of a run. Every method is a collective."""

    def __init__(
        self, stage: Stage, data: TrainingData, run: Run, schedule: Schedule, divergence: DivergenceConfig
    ) -> None:
        self.stage = stage
        self.data = data
        self.run = run
        self.schedule = schedule
        self.recovery = Recovery(divergence, run, stage, data)
        self.window = StepWindow(run.world)
        self.failed_saves = 0  # in a row

    def train(self, state: TrainState) -> TrainState:
        """Train from `state` to the last step of the schedule; the state there.

        Raises:
            Stopped: somebody asked for it; a checkpoint is committed.
            TrainingDiverged: it makes no sense to go on.
            CheckpointsFailing: progress cannot be saved.
            TooManyBadSamples: more of the data is damaged than the run may bear.
        """
        self.run.bad_samples.refuse_too_many()
        self.recovery.has_checkpoint = state.step > 0
        while True:
            self._take_up(state)
            batches = TimedIterator(self.data.batches(state.samples_seen), self.run.heartbeat.beat)
            try:
                self._take_steps(state, batches)
                break
            except RollBack as event:
                batches.close()
                self.window.restart()
                state = self.recovery.roll_back(state, event)
        self.run.stopping.finished()
        return state

    def _take_up(self, state: TrainState) -> None:
        """Step over what was rolled back, make up for a validation that a stop left out, remember what is usual."""
        state.samples_seen = self.recovery.next_sample(state)
        recent = self.run.recent_records(2 * self.recovery.config.spike_window)
        validated = any(record["kind"] == "validation" and record["step"] == state.step for record in recent)
        if state.step > 0 and self.schedule.validates(state.step) and not validated:
            self._validate(state)
        self.recovery.guard.remember(recent)

    def _take_steps(self, state: TrainState, batches: TimedIterator) -> None:
        self.window.restart()
        while state.step < self.schedule.last_step:
            self._take_step(state, batches)
            stop = self.run.stopping.agreed()
            is_saved = bool(stop) or self.schedule.saves(state.step)
            is_validated = not stop and self.schedule.validates(state.step)
            if is_saved or is_validated or self.schedule.logs(state.step):
                self._log(state, batches.take_waited())
            if is_validated:
                self._validate(state)
            if is_saved:
                self._save(state, must_succeed=bool(stop) or state.step == self.schedule.last_step)
            if stop:
                self._stop(stop)
            if is_validated or is_saved:
                self.window.restart()

    def _stop(self, reason: str) -> NoReturn:
        self.run.stopping.finished()
        newest = self.run.checkpoints.latest()
        assert newest is not None, "a run that stops has just been saved"
        raise Stopped(reason, newest)

    def _take_step(self, state: TrainState, batches: TimedIterator) -> None:
        self.run.heartbeat.beat(f"step {state.step + 1}")
        context = self.schedule.context(state)
        metrics = self.stage.train_step(batches, context)
        state.step += 1
        state.samples_seen += self.schedule.global_batch
        self.run.heartbeat.end_start()
        record = self._position(state, "train") | {"learning_rate": context.learning_rate}
        self.window.add(Step(record, metrics, context.samples_seen, state.samples_seen))

    def _position(self, state: TrainState, kind: str) -> Record:
        return {
            "kind": kind,
            "step": state.step,
            "samples_seen": state.samples_seen,
            "epoch": state.samples_seen / self.schedule.num_samples,
            "pflop": state.step * self.schedule.global_batch * self.stage.flops_per_image / FLOPS_PER_PFLOP,
        }

    def _log(self, state: TrainState, waited: float) -> None:
        """Fetch the metrics of the steps since the last time; judge and record each. waited: seconds, for data."""
        steps, seconds = self.window.fetch()
        useful = sum(not self.recovery.guard.problem_of(step.record) for step in steps)
        state.useful_seconds += seconds * useful / len(steps)
        shared = speed_of(len(steps) * self.schedule.global_batch, self.stage.tokens_per_image, seconds, waited)
        shared |= {"goodput": self.run.goodput(state.useful_seconds), "time": wall_time()}
        for step in steps:
            step.record |= shared
        steps[-1].record |= self.stage.window_metrics() | self.run.bad_samples.share(self.run.report)
        accepted: list[Record] = []
        try:
            for step in steps:
                self.recovery.judge(step)
                accepted.append(step.record)
        finally:  # also the steps before one that ends the run or is taken back
            self.run.publish(accepted)
            for record in accepted:
                self.run.report(self._progress_line(record))
        self.run.bad_samples.refuse_too_many()

    def _progress_line(self, record: Record) -> str:
        total_steps, global_batch = self.schedule.total_steps, self.schedule.global_batch
        headline = self.stage.headline(record)
        return progress_line(record, total_steps=total_steps, global_batch=global_batch, headline=headline)

    def _validate(self, state: TrainState) -> None:
        self.run.heartbeat.beat(f"validation at step {state.step}")
        measured = self.stage.validate(self.run.heartbeat.beat) | self.run.bad_samples.share(self.run.report)
        for name, value in measured.items():
            if not is_finite(value):
                raise self.recovery.diverged(f"validation {name} of step {state.step} is {value}")
        record = self._position(state, "validation") | measured | {"time": wall_time()}
        self.run.publish([record])
        self.run.report(f"validation at step {state.step} | {self.stage.headline(record)}")
        self.run.bad_samples.refuse_too_many()

    def _save(self, state: TrainState, *, must_succeed: bool) -> None:
        try:
            self.run.save(self.stage.engines, state, is_kept=self.schedule.keeps(state.step))
        except CheckpointFailed as failure:
            self.failed_saves += 1
            if must_succeed or self.failed_saves >= self.schedule.loop.max_failed_saves:
                raise CheckpointsFailing(f"{failure}; {self.failed_saves} in a row failed") from None
            self.run.report(f"warning: {failure}; training goes on")
            return
        self.failed_saves = 0
        self.recovery.has_checkpoint = True
