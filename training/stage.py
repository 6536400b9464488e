"""What the loop asks of a stage of training, and of the data: a stage takes steps on batches and validates."""

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
    """Where a step stands, and its learning rate and weight decay.

    samples_seen: the position in the global stream of samples at which it starts. progress: the share of the run that
    lies behind, in [0, 1).
    """

    samples_seen: int
    progress: float
    learning_rate: float
    weight_decay: float


class Batch(Protocol):
    """What a loader yields for one rank."""

    @property
    def data(self) -> Tensor:
        """The codes (B, L), or images (B, 3, H, W) to be encoded here."""

    @property
    def labels(self) -> Tensor:
        """The classes (B,)."""

    @property
    def positions(self) -> Tensor:
        """The positions (B,) in the global stream of samples."""

    @property
    def weights(self) -> Tensor:
        """1, or 0 for padding in validation (B,)."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""


class TrainingData(Protocol):
    """The training samples as one rank reads them, by position in the global stream of samples."""

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """Return this rank's endless micro-batches from a position on."""

    def names(self, first_sample: int) -> list[str]:
        """Return what this rank's samples are called in the step that starts at a position."""


class Stage(Protocol):
    """What a stage supplies to the loop."""

    engines: dict[str, Engine]
    flops_per_image: int
    tokens_per_image: int

    def train_step(self, batches: Iterator[Batch], context: StepContext) -> dict[str, Tensor]:
        """Take one optimiser step on this rank's next micro-batches. A collective.

        Returns metrics as tensors on the device, each the mean over this rank's images; "loss" and "gradient_norm" are
        among them.
        """

    def window_metrics(self) -> dict[str, Any]:
        """Return metrics over the steps since the last call, the same on all ranks. A collective."""

    def validate(self, beat: Callable[[str], None]) -> dict[str, Any]:
        """Return metrics over the whole validation set, the same on all ranks. A collective.

        beat: called before and after every wait for a batch, with what begins then.
        """

    def headline(self, record: Record) -> str:
        """Write the part of the progress line that only this stage knows."""
