"""One rank of the worlds that the tests of planning start: real steps through DeepSpeed, whose bytes are counted."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from allocations import AllocationRecorder, Phase
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launchers.bench.models import code_batch
from models.var import VARConfig
from training.engine import engine as training_engine
from training.engine.distributed import World, join_world, leave_world
from training.engine.engine import LIVE_ELEMENTS, Engine, EngineConfig
from training.optim import OptimizerConfig, build_optimizer
from training.planning import zero_memory
from training.planning.activations import logit_bytes
from training.planning.memory import estimate_memory
from training.planning.zero_memory import BACKWARD, LOSS, REDUCTION, UPDATE
from training.stage import StepContext
from training.var_loop import VARStage, build_var

STEPS = 4  # ZeRO-3 records its trace in the second and follows it from the third on
CONTEXT = StepContext(samples_seen=0, progress=0.5, learning_rate=1e-5, weight_decay=0.05)
PAYLOADS = {"_reduce_scatter_base_": 1}  # which argument of a collective is whole, if not the first


@dataclass(frozen=True)
class StepMemory:
    """Bytes allocated on this rank in a step, measured or predicted."""

    resting: int  # between two steps
    forward: int  # what the forward pass leaves for the backward pass, logits included
    backward: int  # the most in forward and backward pass, reduction of gradients included
    update: int  # the most while the optimizer is at work

    @property
    def peak(self) -> int:
        return max(self.backward, self.update)


def compare_all(cases: list[dict[str, Any]]) -> list[dict[str, dict[str, int]]]:
    """Predicted and measured bytes of a step of each case: arguments of VARConfig and EngineConfig, and ema_decay.

    `live_elements` in a case is what ZeRO-3 may keep gathered.
    """
    world = join_world()
    results = []
    for case in cases:
        limit_gathering(case)
        model, engine = VARConfig(**case["model"]), EngineConfig(**case["engine"])
        with AllocationRecorder() as recorder:
            take_steps(recorder, model, engine, world, ema_decay=case.get("ema_decay", 0.0))
        sides = {
            "predicted": predicted(model, engine, world, averages="ema_decay" in case),
            "measured": measured(recorder.phases),
        }
        results.append({name: asdict(side) | {"peak": side.peak} for name, side in sides.items()})
    leave_world()
    return results


def limit_gathering(case: dict[str, Any]) -> None:
    """Let ZeRO-3, and the prediction of its memory, keep fewer elements gathered than a real run."""
    training_engine.LIVE_ELEMENTS = zero_memory.LIVE_ELEMENTS = case.get("live_elements", LIVE_ELEMENTS)


def predicted(model: VARConfig, engine: EngineConfig, world: World, *, averages: bool) -> StepMemory:
    estimate = estimate_memory(model, engine, world.world_size, averages=averages)
    forward = estimate.worst(LOSS).activations + engine.micro_batch * logit_bytes(model, engine)
    backward = max(estimate.worst(name).total for name in (LOSS, BACKWARD, REDUCTION))
    return StepMemory(estimate.resting.total, forward, backward, estimate.worst(UPDATE).total)


def measured(phases: list[Phase]) -> StepMemory:
    before, (forward, backward, update) = phases[-4], phases[-3:]
    return StepMemory(before.live, forward.live - before.live, max(forward.peak, backward.peak), update.peak)


class MarkedEngine(Engine):
    """Our engine, with marks between the parts of a step."""

    recorder: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        self.recorder.mark("forward")
        return result

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.recorder.mark("backward")

    def step(self, **settings: Any) -> Tensor:
        norm = super().step(**settings)
        self.recorder.mark("update")
        return norm


class NoTokenizer:
    """Inputs of the right size: a tokenizer's own memory is not what is measured."""

    def __init__(self, model: VARConfig) -> None:
        self.shape = (model.scales.num_tokens - model.scales.first_tokens, model.code_width)

    def teacher_forcing_inputs(self, codes: Tensor) -> Tensor:
        return torch.zeros(len(codes), *self.shape, device=codes.device)


def take_steps(
    recorder: Any, model_config: VARConfig, engine_config: EngineConfig, world: World, *, ema_decay: float = 0.0
) -> None:
    """STEPS steps of training on one batch, marked by `recorder`. A collective."""
    model = build_var(model_config, engine_config, seed=0).to(world.device)
    settings = OptimizerConfig(ema_decay=ema_decay)
    optimizer = build_optimizer(model, settings, undecayed=model.names_without_weight_decay())
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
            gc.collect()  # DeepSpeed leaves cycles behind when it starts; sooner or later they go
            recorder.mark("ready")
        stage.train_step(repeat(batch), CONTEXT)


class SentBytes(TorchDispatchMode):
    """In place of a recorder of allocations: the bytes that collectives are given between marks, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            name = operator.overloadpacket.__name__
            self.sent[name] = self.sent.get(name, 0) + _bytes_of(args[PAYLOADS.get(name, 0)])
        return operator(*args, **(kwargs or {}))

    def mark(self, name: str) -> None:
        if name == "ready":
            self.sent = {}


def _bytes_of(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes_of, tensors)) if isinstance(tensors, list | tuple) else 0


def count_sent(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """The bytes of payload of every collective in the last of STEPS steps, for each case of `compare_all`."""
    world = join_world()
    results = []
    for case in cases:
        limit_gathering(case)
        with SentBytes() as counter:
            take_steps(counter, VARConfig(**case["model"]), EngineConfig(**case["engine"]), world)
        results.append(counter.sent)
    leave_world()
    return results
