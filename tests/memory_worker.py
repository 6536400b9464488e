"""One rank of the worlds that the tests of memory and communication start: real steps through DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from launchers import benchmark_memory
from launchers.benchmark_memory import STEPS, measure_step, predict_step, take_steps
from models.var import VARConfig
from training.distributed import join_world, leave_world
from training.engine import EngineConfig
from training.optim import OptimizerConfig

PAYLOADS = {"all_reduce": 0, "all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}  # which argument is whole


def compare_all(cases: list[dict[str, Any]]) -> list[dict[str, dict[str, int]]]:
    """Predicted and measured bytes of a step of each case: arguments of VARConfig and EngineConfig, and ema_decay."""
    world = join_world()
    results = []
    for case in cases:
        model, engine = VARConfig(**case["model"]), EngineConfig(**case["engine"])
        measured = measure_step(model, engine, world, ema_decay=case.get("ema_decay", 0.0))
        predicted = predict_step(model, engine, world, averages="ema_decay" in case)
        results.append(
            {"predicted": asdict(predicted), "measured": asdict(measured)}
            | {"peaks": {"predicted": predicted.peak, "measured": measured.peak}}
        )
    leave_world()
    return results


def benchmark(depth: int, batch: int) -> list[dict[str, Any]]:
    """The rows of `benchmark.py memory` on a short schedule."""
    from launchers.benchmark_config import BenchmarkConfig

    rows = benchmark_memory.benchmark_memory(
        BenchmarkConfig(what="memory", depth=depth, batch=batch, patch_nums=(1, 2, 3))
    )
    leave_world()
    return rows


class SentBytes:
    """In place of a recorder of allocations: what collectives were given between the marks of the last step."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.steps: list[dict[str, int]] = []

    def mark(self, name: str) -> None:
        if name == benchmark_memory.STEP_END:
            self.steps.append({kind: sum(size for sent, size in self.sent if sent == kind) for kind in PAYLOADS})
            self.sent.clear()

    def watch(self, kind: str, position: int) -> Callable[..., Any]:
        plain = getattr(dist, kind)

        def counted(*arguments: Any, **named: Any) -> Any:
            whole = arguments[position] if len(arguments) > position else list(named.values())[position]
            self.sent.append((kind, whole.numel() * whole.element_size()))
            return plain(*arguments, **named)

        return counted


def count_sent(model: dict[str, Any], engines: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Bytes of payload by kind of collective in the last of STEPS steps, for each engine."""
    world = join_world()
    results = []
    plain = {kind: getattr(dist, kind) for kind in PAYLOADS}
    for engine in engines:
        counter = SentBytes()
        for kind, position in PAYLOADS.items():
            setattr(dist, kind, counter.watch(kind, position))
        take_steps(counter, VARConfig(**model), EngineConfig(**engine), world, OptimizerConfig())
        for kind, function in plain.items():
            setattr(dist, kind, function)
        assert len(counter.steps) == STEPS
        results.append(counter.steps[-1])
    leave_world()
    return results
