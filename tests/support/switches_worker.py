"""Twenty steps of a small transformer under DeepSpeed for each switch that trades speed or memory; losses as JSON."""

from __future__ import annotations

import json
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

from distributed_worker import TOKENIZER, TRANSFORMER

from launchers.bench.models import code_batch
from models.attention import FLEX, MASKED
from training.engine.distributed import World, join_world
from training.engine.engine import Engine, EngineConfig
from training.optim import OptimizerConfig, build_optimizer
from training.stage import StepContext
from training.tokenizer_loop import build_tokenizer
from training.var_loop import VARStage, build_var

SIZES = {"micro_batch": 4, "reduce_bucket_size": 10**6, "prefetch_bucket_size": 10**6, "persistence_threshold": 1000}
PLAIN = {"zero_stage": 0, "precision": "fp32", "attention": MASKED}
SWITCHES: dict[str, dict[str, Any]] = {
    "attention a scale at a time": {},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, full checkpointing": {"zero_stage": 3, "activation_checkpointing": "full"},
    "selective checkpointing": {"activation_checkpointing": "selective"},
    "compiled blocks": {"compile": True},
    "compiled blocks, ZeRO-3": {"zero_stage": 3, "compile": True},
    "compiled blocks, ZeRO-3, full checkpointing": {
        "zero_stage": 3,
        "compile": True,
        "activation_checkpointing": "full",
    },
}
ON_GPUS = {
    "FlexAttention": {"attention": FLEX},
    "FlexAttention, selective checkpointing": {"attention": FLEX, "activation_checkpointing": "selective"},
    "FlexAttention, compiled": {"attention": FLEX, "compile": True},
}


def twenty_losses(world: World, **engine_settings: Any) -> list[float]:
    settings = EngineConfig(**SIZES | engine_settings)
    model = build_var(TRANSFORMER, settings, seed=0).to(world.device)
    optimizer = build_optimizer(model, OptimizerConfig(), undecayed=model.names_without_weight_decay())
    stage = VARStage(
        Engine(model, optimizer, settings, global_batch=4, world=world),
        build_tokenizer(TOKENIZER, seed=0).to(world.device),
        label_drop=0.1,
        seed=0,
        validation=lambda: (),
    )
    batches = repeat(code_batch(TRANSFORMER, 4))
    context = StepContext(samples_seen=0, progress=0.5, learning_rate=1e-4, weight_decay=0.05)
    return [stage.train_step(batches, context)["loss_avg"].item() for _ in range(20)]


def main(out: Path) -> None:
    world = join_world()
    switches = SWITCHES | (ON_GPUS if world.device.type == "cuda" else {})
    fast = PLAIN | {"attention": EngineConfig.attention}
    losses = {"plain": twenty_losses(world, **PLAIN)}
    losses |= {name: twenty_losses(world, **fast | change) for name, change in switches.items()}
    out.write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
