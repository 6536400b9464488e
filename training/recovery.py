"""What a run does about steps that go wrong: it judges each step, and returns to its newest checkpoint if need be.

All ranks judge the same numbers, so all decide alike. After a roll back the run goes on with the data behind the step
that went wrong; the history remembers that, so that it also holds for a run that is killed and started again.
"""

from __future__ import annotations

import torch

from training.checkpoints.checkpoint import TrainState
from training.engine.distributed import failing_together, gather_objects
from training.run import Run
from training.stage import Stage, TrainingData
from training.step_metrics import Step, name_some
from training.supervision.divergence import DivergenceConfig, DivergenceGuard, RollBack, TrainingDiverged
from training.supervision.history import ROLL_BACK


class Recovery:
    """The guard over the steps of one run, and its roll backs. Making one is a collective."""

    def __init__(self, config: DivergenceConfig, run: Run, stage: Stage, data: TrainingData) -> None:
        self.config = config
        self.run = run
        self.stage = stage
        self.data = data
        # with fp16's loss scaling an infinite gradient is no accident: the step is skipped and the scale lowered
        scales_loss = any(engine.config.precision == "fp16" for engine in stage.engines.values())
        self.guard = DivergenceGuard(config, scales_loss=scales_loss)
        # of every roll back so far: the step returned to, and the first sample after it
        self.roll_backs = [(event["to"], event["next_sample"]) for event in run.events(ROLL_BACK)]
        self.has_checkpoint = False

    def next_sample(self, state: TrainState) -> int:
        """The stream position to go on from: behind the samples that a roll back to this step has stepped over."""
        return max([state.samples_seen, *(position for step, position in self.roll_backs if step == state.step)])

    def judge(self, step: Step) -> None:
        """Let a step pass, with a warning if it was skipped. A collective for a step that is not finite.

        Raises:
            TrainingDiverged: the run must end.
            RollBack: the run must return to its newest checkpoint.
        """
        blame = self._blame(step) if self.guard.problem_of(step.record) else ""
        try:
            warning = self.guard.judge(step.record, step.next_sample, blame, can_roll_back=self.has_checkpoint)
        except TrainingDiverged as error:
            raise self.diverged(str(error)) from None
        if warning:
            self.run.report(f"warning: {warning}")

    def diverged(self, why: str) -> TrainingDiverged:
        """The error that ends the run, with the advice how to go on."""
        return TrainingDiverged(f"{why}; {self.run.newest_checkpoint()}: resume from it with a lower optimizer.base_lr")

    def _blame(self, step: Step) -> str:
        """The ranks whose own loss is not finite, and their samples; the same on all ranks. A collective."""
        is_bad = not bool(torch.isfinite(step.metrics["loss"]).all())
        names = self._names(step.first_sample) if is_bad else []
        ranks = enumerate(gather_objects((is_bad, names), self.run.world))
        blamed = [f"rank {rank}, {name_some(names)}" for rank, (is_bad, names) in ranks if is_bad]
        return "; ".join(blamed) or "the loss of every rank is finite, the gradient is not"

    def _names(self, first_sample: int) -> list[str]:
        try:
            return self.data.names(first_sample)
        except (OSError, ValueError) as error:  # the others wait for what this rank has to say
            return [f"from position {first_sample} on, which cannot be read ({error})"]

    def roll_back(self, state: TrainState, event: RollBack) -> TrainState:
        """Return to the newest checkpoint, and forget the steps after it. A collective.

        Raises:
            TrainingDiverged: there were divergence.max_roll_backs to this checkpoint already.
            RankFailure, RunFolderGone: the folder is no longer there.
        """
        with failing_together(self.run.world):
            self.run.refuse_gone()
        heartbeat = self.run.heartbeat
        heartbeat.beat("rolling back", allow_seconds=heartbeat.config.start_seconds)
        restored = self.run.checkpoints.resume(self.stage.engines)
        assert restored is not None, "a roll back is judged possible only once there is a checkpoint"
        earlier = sum(step == restored.step for step, _ in self.roll_backs)
        if earlier == self.config.max_roll_backs:
            raise self.diverged(f"{event}, after {earlier} roll backs to step {restored.step}")
        self.roll_backs.append((restored.step, event.next_sample))
        skipped = event.next_sample - restored.samples_seen
        self.run.report(f"rolled back to step {restored.step}, stepping over {skipped} samples: {event}")
        facts = {"step": state.step, "to": restored.step, "next_sample": event.next_sample, "samples": skipped}
        self.run.note(ROLL_BACK, **facts, reason=str(event))
        self.run.forget_after(restored.step)
        return restored
