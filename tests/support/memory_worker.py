"""One rank of the worlds that the tests of memory and communication start: real steps through DeepSpeed."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launchers.bench import memory as benchmark_memory
from launchers.bench.memory import measure_step, predict_step, take_steps
from models.var import VARConfig
from training.engine import engine as training_engine
from training.engine.distributed import join_world, leave_world
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.optim import OptimizerConfig
from training.planning import zero_memory
from training.planning.gathering import gathering

PAYLOADS = {"_reduce_scatter_base_": 1}  # which argument is whole, if not the first


def compare_all(cases: list[dict[str, Any]]) -> list[dict[str, dict[str, int]]]:
    """Predicted and measured bytes of a step of each case: arguments of VARConfig and EngineConfig, and ema_decay.

    `live_elements` in a case: what ZeRO-3 is to make do with.
    """
    world = join_world()
    results = []
    for case in cases:
        limit_gathering(case)
        model, engine = VARConfig(**case["model"]), EngineConfig(**case["engine"])
        measured = measure_step(model, engine, world, ema_decay=case.get("ema_decay", 0.0))
        predicted = predict_step(model, engine, world, averages="ema_decay" in case)
        results.append(
            {"predicted": asdict(predicted), "measured": asdict(measured)}
            | {"peaks": {"predicted": predicted.peak, "measured": measured.peak}}
        )
    leave_world()
    return results


def limit_gathering(case: dict[str, Any]) -> None:
    """Let ZeRO-3, and what is predicted of its memory, keep fewer elements gathered than a real run."""
    training_engine.LIVE_ELEMENTS = case.get("live_elements", LIVE_ELEMENTS)
    zero_memory.gathering = partial(gathering, live_elements=training_engine.LIVE_ELEMENTS)


def benchmark(depth: int, batch: int) -> list[dict[str, Any]]:
    """The rows of `benchmark.py memory` on a short schedule."""
    from launchers.bench.config import BenchmarkConfig

    rows = benchmark_memory.benchmark_memory(
        BenchmarkConfig(what="memory", depth=depth, batch=batch, patch_nums=(1, 2, 3))
    )
    leave_world()
    return rows


class SentBytes(TorchDispatchMode):
    """In place of a recorder of allocations: what collectives are given between marks, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, dict[str, int]] = {}
        self.passes: list[tuple[str, dict[str, dict[str, int]]]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == "c10d":
            name = operator.overloadpacket.__name__
            counted = self.sent.setdefault(name, {"bytes": 0, "calls": 0})
            counted["bytes"] += _bytes_of(args[PAYLOADS.get(name, 0)])
            counted["calls"] += 1
        return operator(*args, **(kwargs or {}))

    def mark(self, name: str) -> None:
        self.passes.append((name, self.sent))
        self.sent = {}


def _bytes_of(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes_of, tensors)) if isinstance(tensors, list | tuple) else 0


def count_sent(cases: list[dict[str, Any]]) -> list[dict[str, dict[str, dict[str, int]]]]:
    """Bytes of payload and calls of every collective in the three parts of the last of STEPS steps, for each case.

    A case is one of `compare_all`.
    """
    world = join_world()
    results = []
    for case in cases:
        limit_gathering(case)
        with SentBytes() as counter:
            model, engine = VARConfig(**case["model"]), EngineConfig(**case["engine"])
            take_steps(counter, model, engine, world, OptimizerConfig())
        results.append(dict(counter.passes[-3:]))
    leave_world()
    return results
