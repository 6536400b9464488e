"""`benchmark.py train`: one training step of the transformer, ours, a bare PyTorch loop, and the public code's.

All have the same weights, batch, precision and device. Ours is the step that training takes, DeepSpeed and all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import torch
from torch.nn import functional as F

from data_pipeline.loader import Batch
from launchers.benchmark_models import code_batch, make_tokenizer, public_code, var_config
from launchers.benchmark_timing import Contestant, Row, time_in_turns
from launchers.config import BenchmarkConfig
from launchers.machine_limits import device_type, synchronize
from models.vqvae import VQVAE
from training.distributed import World, join_world
from training.engine import Engine, EngineConfig
from training.flops import training_flops
from training.optim import OptimizerConfig, build_optimizer
from training.stage import StepContext
from training.var_loop import VARStage, build_var

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.05
CONTEXT = StepContext(samples_seen=0, progress=0.5, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def benchmark_train(config: BenchmarkConfig) -> list[Row]:
    """Images a second; the first row is the public code's step on given codes, where it is there."""
    world = join_world()
    tokenizer = make_tokenizer(config).to(world.device)
    model_config = var_config(config)
    codes = code_batch(model_config, config.batch)
    common = {"flops_per_image": training_flops(model_config), "precision": config.precision}
    engine = EngineConfig(precision=config.precision, micro_batch=config.batch, zero_stage=1)
    contestants = [
        Contestant("ours, codes", our_step(config, engine, tokenizer, codes, world), **common),
        Contestant("bare PyTorch loop, codes", bare_step(config, tokenizer, codes), **common),
    ]
    with public_code(config, build_var(model_config, seed=0, activation_checkpointing=False), tokenizer) as public:
        if public is not None:
            contestants = [
                Contestant("public, codes", public.timed("train_step", batch=config.batch, encodes=False), **common),
                *contestants,
                Contestant("public, images", public.timed("train_step", batch=config.batch, encodes=True), **common),
            ]
        return time_in_turns(contestants, config.repeats)


def our_step(
    config: BenchmarkConfig, engine: EngineConfig, tokenizer: VQVAE, batch: Batch, world: World
) -> Callable[[], int]:
    """A step of VARStage, as training takes it."""
    model_config = var_config(config)
    model = build_var(model_config, seed=0, activation_checkpointing=False).to(world.device)
    optimizer = build_optimizer(model, OptimizerConfig(), undecayed=model.names_without_weight_decay())
    stage = VARStage(
        Engine(model, optimizer, engine, global_batch=config.batch, world=world),
        model_config,
        tokenizer,
        label_drop=0.1,
        global_batch=config.batch,
        seed=0,
        world=world,
        validation=lambda: (),
    )
    batches = repeat(batch)

    def call() -> int:
        stage.train_step(batches, CONTEXT)
        synchronize()
        return config.batch

    return call


def bare_step(config: BenchmarkConfig, tokenizer: VQVAE, batch: Batch) -> Callable[[], int]:
    """The least that trains the same model: forward, loss, backward, clipping and AdamW, without DeepSpeed or ours."""
    model_config = var_config(config)
    model = build_var(model_config, seed=0, activation_checkpointing=False).to(device_type())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    batch = batch.to(device_type())

    def call() -> int:
        inputs = tokenizer.teacher_forcing_inputs(batch.data)
        with torch.autocast(device_type(), dtype=engine_dtype(config), enabled=config.precision != "fp32"):
            logits = model(inputs, batch.labels)
        F.cross_entropy(logits.flatten(0, 1), batch.data.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        return config.batch

    return call


def engine_dtype(config: BenchmarkConfig) -> torch.dtype:
    return EngineConfig(precision=config.precision).dtype
