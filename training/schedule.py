"""What happens at which step of a run: its length, its rhythm, its learning rate and weight decay.

All of it is a function of the settings and the step, so a resumed run needs nothing but its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from training.checkpoints.checkpoint import TrainState
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig, learning_rate_factor, weight_decay_at
from training.stage import StepContext


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run. Steps count from 1; a question about step n is asked after it was taken."""

    loop: LoopConfig
    optimizer: OptimizerConfig
    num_samples: int  # in one epoch

    @property
    def global_batch(self) -> int:
        """The images of one step, over all ranks."""
        return self.loop.global_batch

    @cached_property
    def total_steps(self) -> int:
        """The steps of the whole run."""
        return self.loop.total_steps(self.num_samples)

    @property
    def last_step(self) -> int:
        """The step after which this process leaves: the last of the run, or loop.stop_after_steps."""
        return min(self.total_steps, self.loop.stop_after_steps or self.total_steps)

    @cached_property
    def _kept_steps(self) -> frozenset[int]:
        return self.loop.kept_steps(self.total_steps)

    def keeps(self, step: int) -> bool:
        """Tell whether the checkpoint of this step is never forgotten."""
        return step in self._kept_steps

    def saves(self, step: int) -> bool:
        """Tell whether a checkpoint follows this step."""
        return step % self.loop.checkpoint_every == 0 or step == self.last_step or self.keeps(step)

    def validates(self, step: int) -> bool:
        """Tell whether a validation follows this step."""
        return self.loop.validation_is_due(step, total_steps=self.total_steps, num_samples=self.num_samples)

    def logs(self, step: int) -> bool:
        """Tell whether metrics are fetched after this step, besides before a validation or a checkpoint."""
        return step % self.loop.log_every == 0

    def context(self, state: TrainState) -> StepContext:
        """Return the place of the step that follows `state`, and its learning rate and weight decay."""
        progress = state.step / self.total_steps
        peak = self.optimizer.peak_lr(self.global_batch)
        return StepContext(
            samples_seen=state.samples_seen,
            progress=progress,
            learning_rate=peak * learning_rate_factor(progress, self.optimizer),
            weight_decay=weight_decay_at(progress, self.optimizer),
        )
