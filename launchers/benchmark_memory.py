"""`benchmark.py memory`: predicted beside measured bytes of a training step, through DeepSpeed, at world size 1.

Measured is what lies allocated: torch's own count on CUDA, every allocation of torch's CPU allocator elsewhere. Rows are
the modes of activation checkpointing under ZeRO stages 1 and 3; `error` is the prediction's, of the measured peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import Batch
from launchers.allocations import AllocationRecorder, Phase
from launchers.benchmark_models import code_batch, var_config
from launchers.benchmark_timing import Row
from launchers.config import BenchmarkConfig
from models.var import VARConfig
from training.activations import FLOAT32, FULL, NONE, SELECTIVE
from training.distributed import World, join_world
from training.engine import Engine, EngineConfig
from training.memory import LOSS, UPDATE, MemoryEstimate, estimate_memory
from training.optim import OptimizerConfig, build_optimizer
from training.stage import StepContext
from training.var_loop import VARStage, build_var

STEPS = 4  # ZeRO-3 records its trace in the second and follows it from the third on
STAGES = (1, 3)
FORWARD, BACKWARD, STEP = "forward", "backward", "step"
CONTEXT = StepContext(samples_seen=0, progress=0.5, learning_rate=1e-5, weight_decay=0.05)


@dataclass(frozen=True)
class MeasuredStep:
    """Bytes allocated on this rank in a step that has all its state."""

    resting: int  # between two steps
    forward: int  # what the forward pass has left behind for the backward pass, logits included
    backward: int  # the most in forward and backward pass, reduction of gradients included
    update: int  # the most while the optimiser is at work

    @property
    def peak(self) -> int:
        return max(self.backward, self.update)


class MarkedEngine(Engine):
    """Our engine, with marks between the parts of a step."""

    recorder: AllocationRecorder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        self.recorder.mark(FORWARD)
        return result

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.recorder.mark(BACKWARD)

    def step(self, **settings: Any) -> Tensor:
        norm = super().step(**settings)
        self.recorder.mark(STEP)
        return norm


class NoTokenizer:
    """Inputs of the right size: a tokenizer's own memory is not what is measured."""

    def __init__(self, model: VARConfig) -> None:
        self.shape = (model.scales.num_tokens - model.scales.first_tokens, model.code_width)

    def teacher_forcing_inputs(self, codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), *self.shape, device=codes.device)


def measure_step(
    model_config: VARConfig, engine: EngineConfig, world: World, *, ema_decay: float = 0.0
) -> MeasuredStep:
    """Build a model and its engine, take STEPS steps of training, and measure the last. A collective."""
    with AllocationRecorder() as recorder:
        _take_steps(recorder, model_config, engine, world, OptimizerConfig(ema_decay=ema_decay))
    return _measured(recorder.phases)


def _take_steps(
    recorder: AllocationRecorder,
    model_config: VARConfig,
    engine_config: EngineConfig,
    world: World,
    optimizer_config: OptimizerConfig,
) -> None:
    model = build_var(
        model_config,
        seed=0,
        attention=engine_config.attention,
        activation_checkpointing=engine_config.activation_checkpointing,
    ).to(world.device)
    optimizer = build_optimizer(model, optimizer_config, undecayed=model.names_without_weight_decay())
    global_batch = engine_config.micro_batch * world.world_size
    engine = MarkedEngine(model, optimizer, engine_config, global_batch=global_batch, world=world)
    engine.recorder = recorder
    stage = VARStage(
        engine,
        model_config,
        NoTokenizer(model_config),
        label_drop=0.1,
        global_batch=global_batch,
        seed=0,
        world=world,
        validation=lambda: (),
    )
    batch: Batch = code_batch(model_config, engine_config.micro_batch)
    for _ in range(STEPS):
        stage.train_step(repeat(batch), CONTEXT)


def _measured(phases: list[Phase]) -> MeasuredStep:
    before, (forward, backward, update) = phases[-4], phases[-3:]
    return MeasuredStep(
        before.live, forward.live - before.live, max(forward.peak, backward.peak), update.peak
    )
