"""Runs of the outer loop that count instead of learning, and remember what they were asked to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.checkpoints.checkpoint import CheckpointFailed, TrainState
from training.engine.distributed import World
from training.loop import Loop
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig
from training.run import Run
from training.schedule import Schedule
from training.stage import StepContext
from training.supervision.divergence import DivergenceConfig
from training.supervision.stopping import Stopping
from training.supervision.watch import Heartbeat, WatchConfig
from training.tracking.record import Record

ALONE = World()
SKIP = DivergenceConfig()
NUM_SAMPLES = 40
GLOBAL_BATCH = 8  # 5 steps an epoch


class CountingStage:
    """Reports what it was asked to do."""

    flops_per_image = 10**12
    tokens_per_image = 5

    def __init__(self) -> None:
        self.engines: dict[str, Any] = {}
        self.contexts: list[StepContext] = []
        self.batches: list[int] = []
        self.num_validations = 0

    def train_step(self, batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
        self.contexts.append(context)
        self.batches.append(next(batches))
        loss = torch.tensor(float(len(self.contexts)))
        return {"loss_avg": loss, "loss": torch.stack([loss, 2 * loss]), "gradient_norm": torch.tensor(0.5)}

    def window_metrics(self) -> dict[str, Any]:
        return {"codebook_use": 1.0}

    def validate(self, beat: Callable[[str], None]) -> dict[str, Any]:
        self.num_validations += 1
        return {"loss_avg": 7.0}

    def headline(self, record: Record) -> str:
        return f"loss {record['loss_avg']}"


class RememberedCheckpoints:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.kept: list[int] = []
        self.samples: dict[int, int] = {}
        self.failures = 0  # of the next saves

    def save(self, engines: dict[str, Any], state: TrainState, *, is_kept: bool, notes: dict[str, Any]) -> Path:
        if self.failures:
            self.failures -= 1
            raise CheckpointFailed(f"step-{state.step:08d} is not saved: disk full")
        self.steps.append(state.step)
        self.samples[state.step] = state.samples_seen
        self.kept += [state.step] if is_kept else []
        return self.latest()

    def latest(self) -> Path | None:
        return Path(f"step-{self.steps[-1]:08d}") if self.steps else None

    def resume(self, engines: dict[str, Any]) -> TrainState | None:
        return TrainState(self.steps[-1], self.samples[self.steps[-1]]) if self.steps else None


class CountedData:
    """Batches that are the positions of their first samples."""

    def batches(self, samples_seen: int) -> Iterator[int]:
        return count(samples_seen, GLOBAL_BATCH)

    def names(self, first_sample: int) -> list[str]:
        return [f"a.tar:{first_sample}"]


class CountedRun:
    """A loop in a folder, what it drove and what it reported."""

    def __init__(
        self,
        folder: Path,
        *,
        divergence: DivergenceConfig = SKIP,
        world: World = ALONE,
        **config: Any,
    ) -> None:
        self.stage, self.checkpoints, self.lines = CountingStage(), RememberedCheckpoints(), []
        settings = {"global_batch": GLOBAL_BATCH, "epochs": 2.0, "validate_every": 1.0} | config
        self.schedule = Schedule(LoopConfig(**settings), OptimizerConfig(), NUM_SAMPLES)
        self.divergence = divergence
        self.run = run_in(folder, self.checkpoints, self.lines.append, world)

    def go(self, state: TrainState | None = None) -> TrainState:
        loop = Loop(self.stage, CountedData(), self.run, self.schedule, self.divergence)
        return loop.train(state or TrainState())

    def records(self, kind: str = "train") -> list[Record]:
        """What was recorded of the steps, or as "validation"."""
        return [record for record in self.run.record.read() if record["kind"] == kind]

    def steps(self, kind: str = "train") -> list[int]:
        """The steps that were recorded."""
        return [record["step"] for record in self.records(kind)]


def run_in(folder: Path, checkpoints: Any, report: Callable[[str], None], world: World = ALONE) -> Run:
    """A run that nobody watches, and that only the file `stop` can stop."""
    return Run(folder, world, checkpoints, Stopping(folder, world), Heartbeat(WatchConfig()), report)
