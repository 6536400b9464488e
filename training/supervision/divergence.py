"""The steps that go wrong: numbers that are not finite, losses that jump, and what is done about them.

A step whose gradient is not finite has changed nothing: the engine passes it over on all ranks. Whether the run then
goes on, stops, or returns to its newest checkpoint and steps over the data in between, is decided here, from metrics
that are the same on all ranks, so that all decide alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

Record = dict[str, Any]
BAD_STEP_POLICIES = ("skip", "stop", "roll_back")
SPIKE_POLICIES = ("warn", "roll_back")
MIN_LOSSES = 20  # to say what is usual
DEVIATIONS_PER_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class TrainingDiverged(ArithmeticError):
    """Training cannot go on usefully; nothing of it was saved."""

    exit_code: ClassVar[int] = 70


class RollBack(Exception):
    """Return to the newest checkpoint, and go on behind the samples of the step that went wrong."""

    def __init__(self, reason: str, next_sample: int) -> None:
        super().__init__(reason)
        self.next_sample = next_sample


@dataclass(frozen=True)
class DivergenceConfig:
    """What is done about a loss or gradient that is not finite (`on_bad_step`), and about a loss that jumps."""

    on_bad_step: str = "skip"  # go on with the next one; or "stop"; or "roll_back" and step over the data
    max_skips: int = 3  # in a row, before the run stops all the same
    on_spike: str = "warn"  # or "roll_back"
    spike_deviations: float = 12.0  # above the usual loss, in its usual deviations; 0: no spikes are looked for
    spike_window: int = 100  # steps that say what is usual
    max_roll_backs: int = 2  # to one checkpoint, restarts included, before the run stops all the same

    def __post_init__(self) -> None:
        for name, accepted in (("on_bad_step", BAD_STEP_POLICIES), ("on_spike", SPIKE_POLICIES)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"divergence.{name} is '{getattr(self, name)}'; accepted: {', '.join(accepted)}")
        for name in ("max_skips", "spike_deviations", "max_roll_backs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"divergence.{name} is {getattr(self, name)}; it must be 0 or more")
        if self.spike_window < MIN_LOSSES:
            raise ValueError(f"divergence.spike_window is {self.spike_window}; it must be at least {MIN_LOSSES} steps")


class DivergenceGuard:
    """Judges the steps of a run in their order. With `scales_loss` (fp16) an infinite gradient is no accident."""

    def __init__(self, config: DivergenceConfig, *, scales_loss: bool) -> None:
        self.config = config
        self.scales_loss = scales_loss
        self.skips_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def remember(self, records: Iterable[Record]) -> None:
        """Take the losses before a resumed step as what is usual, as if the run had never been interrupted."""
        self._losses.clear()
        self.skips_in_a_row = 0
        for record in records:
            if record["kind"] == "train" and self.problem_of(record):
                self.skips_in_a_row += 1
            elif record["kind"] == "train":
                self._note(record)

    def problem_of(self, record: Record) -> str:
        """Return what is not finite in a training record, such as "the loss is nan", or ""."""
        if not is_finite(record["loss"]):
            return f"the loss is {record['loss']}"
        if not self.scales_loss and not is_finite(record["gradient_norm"]):
            return f"the gradient norm is {record['gradient_norm']}"
        return ""

    def judge(self, record: Record, next_sample: int, blame: str, *, can_roll_back: bool = True) -> str:
        """Return a warning about this step, or "" if it is as it should be.

        next_sample: stream position behind the step. blame: ranks and samples of a step that is not finite.
        can_roll_back: there is a checkpoint to return to; until there is one, a bad step is skipped instead.

        Raises:
            TrainingDiverged: the policy is to stop, or patience has ended.
            RollBack: the policy is to roll back.
        """
        problem, step = self.problem_of(record), record["step"]
        if not problem:
            spike = self._spike(record)
            self._note(record)
            if spike and self.config.on_spike == "roll_back" and can_roll_back:
                raise RollBack(f"step {step}: {spike}", next_sample)
            return f"step {step}: {spike}" if spike else ""
        said = f"step {step}: {problem} ({blame})"
        if self.config.on_bad_step == "roll_back" and can_roll_back:
            raise RollBack(said, next_sample)
        self.skips_in_a_row += 1
        if self.config.on_bad_step == "stop":
            raise TrainingDiverged(said)
        if self.skips_in_a_row > self.config.max_skips:
            raise TrainingDiverged(f"{said}, after {self.config.max_skips} such steps in a row")
        return f"{said}; skipped, {self.skips_in_a_row} in a row"

    def _note(self, record: Record) -> None:
        self.skips_in_a_row = 0
        self._losses.append(typical_loss(record))

    def _spike(self, record: Record) -> str:
        """Return how far a loss lies above the median, if by more median absolute deviations than are usual."""
        loss = typical_loss(record)
        if self.config.spike_deviations == 0 or len(self._losses) < MIN_LOSSES:
            return ""
        usual = median(self._losses)
        deviation = DEVIATIONS_PER_MAD * median(abs(other - usual) for other in self._losses)
        if loss - usual <= self.config.spike_deviations * max(deviation, 1e-3 * abs(usual)):
            return ""
        return f"the loss {loss:.4g} is far above the {usual:.4g} of the {len(self._losses)} steps before"


def typical_loss(record: Record) -> float:
    """Return the one loss of a step that is watched: the average over the tokens where there is one per scale."""
    loss: float = record["loss_avg"] if "loss_avg" in record else record["loss"]
    return loss


def is_finite(value: float | list[float] | None) -> bool:
    """Return whether a metric is a finite number, or all of a list are; None is one that was not when recorded."""
    numbers = value if isinstance(value, list) else [value]
    return all(number is not None and math.isfinite(number) for number in numbers)
