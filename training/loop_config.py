"""Length and rhythm of a run: how many steps, and when to log, validate and save."""

from __future__ import annotations

import math
from dataclasses import dataclass

EVALUATED_DECADES = 3  # of a run's compute, where evaluations are spaced by it: from 0.1 % of the run to its end


@dataclass(frozen=True)
class LoopConfig:
    """Length and rhythm of a run."""

    global_batch: int = 768
    epochs: float = 200.0
    log_every: int = 10  # steps between fetches of metrics; every step is recorded all the same
    validate_every: float = 10.0  # epochs
    validate_per_decade: float = 0.0  # instead of that: so many a decade of compute, from 0.1 % of the run on; 0: off
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2  # the newest so many
    keep_every: int = 0  # steps: checkpoints of their multiples are never forgotten either; 0: none
    keep_at: tuple[float, ...] = ()  # shares of the run, in (0, 1], whose checkpoints are saved and never forgotten
    max_failed_saves: int = 3  # in a row, before the run gives up; the last save of a run must not fail
    stop_after_steps: int = 0  # 0: run to the end; else leave, with a checkpoint, after this many steps in all

    def __post_init__(self) -> None:
        for name in (
            *("global_batch", "epochs", "log_every", "validate_every"),
            *("checkpoint_every", "keep_checkpoints", "max_failed_saves"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be positive")
        for name in ("stop_after_steps", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} is {getattr(self, name)}; it must be 0 (off) or positive")
        if not 0 <= self.validate_per_decade <= 100:
            raise ValueError(f"loop.validate_per_decade is {self.validate_per_decade}; accepted: 0 (off) to 100")
        for share in self.keep_at:
            if not 0 < share <= 1:
                raise ValueError(f"loop.keep_at has {share}; it holds shares of the run, above 0 and up to 1")

    def total_steps(self, num_samples: int) -> int:
        return max(1, math.ceil(self.epochs * num_samples / self.global_batch))

    def kept_steps(self, total_steps: int) -> frozenset[int]:
        """The steps whose checkpoints are never forgotten."""
        return frozenset(max(1, round(share * total_steps)) for share in self.keep_at)

    def validation_is_due(self, step: int, *, total_steps: int, num_samples: int) -> bool:
        """Tell whether a validation follows step 1, 2, ...: a function of the step alone, true of the last step."""
        if self.validate_per_decade:
            return step in self.log_spaced_steps(total_steps)
        every = self.validate_every * num_samples
        position = step * self.global_batch
        return step == total_steps or position // every > (position - self.global_batch) // every

    def log_spaced_steps(self, total_steps: int) -> frozenset[int]:
        """The steps total * 10^(-j / validate_per_decade), rounded: every step of a run costs the same compute."""
        points = range(math.floor(EVALUATED_DECADES * self.validate_per_decade) + 1)
        return frozenset(max(1, round(total_steps * 10 ** (-j / self.validate_per_decade))) for j in points)
