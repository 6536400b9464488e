"""What a stage of training is to the loop: one optimiser step and one validation pass, and the batches they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.engine.engine import Engine
from training.tracking.record import Record


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

    def validate(self, beat: Callable[[str], None]) -> dict[str, Any]:
        """Metrics over the whole validation set, the same on all ranks; `beat` at every batch. A collective."""

    def headline(self, record: Record) -> str:
        """The part of the progress line that only this stage knows."""
