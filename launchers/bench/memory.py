"""`benchmark.py memory`: predicted beside measured bytes of a training step, through DeepSpeed, at world size 1.

Measured is what lies allocated: torch's own count on CUDA, every allocation of torch's CPU allocator elsewhere. There
is a group of rows for each mode of activation checkpointing under ZeRO stages 1 and 3; `error` is the prediction's, in
shares of what was measured. The buckets of ZeRO are smaller than the defaults, which would hide everything else.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from itertools import product, repeat
from typing import Any

import torch
from torch import Tensor

from launchers.bench.allocations import AllocationRecorder, Phase
from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import code_batch, var_config
from launchers.bench.timing import Row
from models.var import CHECKPOINTINGS, VARConfig
from training.engine.distributed import World, join_world
from training.engine.engine import Engine, EngineConfig
from training.optim import OptimizerConfig, build_optimizer
from training.planning.activations import logit_bytes
from training.planning.memory import BACKWARD, LOSS, REDUCTION, UPDATE, MemoryEstimate, estimate_memory
from training.stage import StepContext
from training.var_loop import VARStage, build_var

STEPS = 4  # ZeRO-3 records its trace in the second and follows it from the third on
STAGES = (1, 3)
BUCKET = 2_000_000
READY, FORWARD_END, BACKWARD_END, STEP_END = "ready", "forward", "backward", "step"
CONTEXT = StepContext(samples_seen=0, progress=0.5, learning_rate=1e-5, weight_decay=0.05)


def benchmark_memory(config: BenchmarkConfig) -> list[Row]:
    """Predicted and measured bytes by component and in total, for every mode of checkpointing and both stages."""
    world = join_world()
    rows: list[Row] = []
    for stage, mode in product(STAGES, CHECKPOINTINGS):
        engine = EngineConfig(
            zero_stage=stage,
            precision=config.precision,
            micro_batch=config.batch,
            compile=config.compile,
            activation_checkpointing=mode,
            reduce_bucket_size=BUCKET,
            prefetch_bucket_size=BUCKET,
        )
        measured = measure_step(var_config(config), engine, world)
        rows += compare(f"ZeRO {stage}, {mode} checkpointed", predict_step(var_config(config), engine, world), measured)
    return rows


def compare(name: str, predicted: MeasuredStep, measured: MeasuredStep) -> list[Row]:
    """A row for each part of the step, and one for its peak."""
    parts = {
        "between steps": (predicted.resting, measured.resting),
        "kept by forward pass": (predicted.forward, measured.forward),
        "most in forward and backward": (predicted.backward, measured.backward),
        "most in update": (predicted.update, measured.update),
        "peak": (predicted.peak, measured.peak),
    }
    return [
        {"name": f"{name}: {part}", "predicted_bytes": guess, "peak_bytes": found, "error": guess / found - 1}
        for part, (guess, found) in parts.items()
    ]


@dataclass(frozen=True)
class MeasuredStep:
    """Bytes allocated on this rank in a step that has all its state, measured or predicted."""

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
        self.recorder.mark(FORWARD_END)
        return result

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.recorder.mark(BACKWARD_END)

    def step(self, **settings: Any) -> Tensor:
        norm = super().step(**settings)
        self.recorder.mark(STEP_END)
        return norm


class NoTokenizer:
    """Inputs of the right size: a tokenizer's own memory is not what is measured."""

    def __init__(self, model: VARConfig) -> None:
        self.shape = (model.scales.num_tokens - model.scales.first_tokens, model.code_width)

    def teacher_forcing_inputs(self, codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), *self.shape, device=codes.device)


def predict_step(
    model_config: VARConfig, engine: EngineConfig, world: World, *, averages: bool = False
) -> MeasuredStep:
    """What `measure_step` should find."""
    estimate: MemoryEstimate = estimate_memory(model_config, engine, world.world_size, averages=averages)
    forward = estimate.worst(LOSS).activations + engine.micro_batch * logit_bytes(model_config, engine)
    backward = max(estimate.worst(name).total for name in (LOSS, BACKWARD, REDUCTION))
    return MeasuredStep(estimate.resting.total, forward, backward, estimate.worst(UPDATE).total)


def measure_step(
    model_config: VARConfig, engine: EngineConfig, world: World, *, ema_decay: float = 0.0
) -> MeasuredStep:
    """Build a model and its engine, take STEPS steps of training, and measure the last. A collective."""
    with AllocationRecorder() as recorder:
        take_steps(recorder, model_config, engine, world, OptimizerConfig(ema_decay=ema_decay))
    return _measured(recorder.phases)


def take_steps(
    recorder: AllocationRecorder,
    model_config: VARConfig,
    engine_config: EngineConfig,
    world: World,
    optimizer_config: OptimizerConfig,
) -> None:
    """STEPS steps of training on one batch, marked by `recorder`. A collective."""
    model = build_var(model_config, engine_config, seed=0).to(world.device)
    optimizer = build_optimizer(model, optimizer_config, undecayed=model.names_without_weight_decay())
    global_batch = engine_config.micro_batch * world.world_size
    engine = MarkedEngine(model, optimizer, engine_config, global_batch=global_batch, world=world)
    engine.recorder = recorder
    stage = VARStage(
        engine,
        NoTokenizer(model_config),
        label_drop=0.1,
        seed=0,
        validation=lambda: (),
    )
    batch = code_batch(model_config, engine_config.micro_batch)
    for step in range(STEPS):
        if step == STEPS - 1:
            gc.collect()  # DeepSpeed leaves cycles behind when it starts; later or sooner they go
            recorder.mark(READY)
        stage.train_step(repeat(batch), CONTEXT)


def _measured(phases: list[Phase]) -> MeasuredStep:
    before, (forward, backward, update) = phases[-4], phases[-3:]
    return MeasuredStep(before.live, forward.live - before.live, max(forward.peak, backward.peak), update.peak)
