"""`benchmark.py train`: one training step of the transformer, with all that training does in it.

Beside ours stand a bare PyTorch loop, and the public code's step, on codes and on images that it encodes every time.
All have the same weights, batch, precision and device. On several ranks ours is measured alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch.nn import functional as F

from data_pipeline.loading.batches import Batch
from data_pipeline.loading.loader import train_batches
from launchers.bench.config import OURS, BenchmarkConfig
from launchers.bench.models import code_batch, make_codes, make_tokenizer, make_var, public_code, var_config
from launchers.bench.public_code import PublicCode
from launchers.bench.timing import Contestant, Row, common_precision, device_type, synchronize, time_in_turns
from launchers.setup.loading import place_tokenizer
from models.var import VAR
from models.vqvae import VQVAE
from training.engine.distributed import World, join_world
from training.engine.engine import Engine, EngineConfig
from training.flops import encoding_flops, training_flops
from training.optim import OptimizerConfig, build_optimizer
from training.stage import StepContext
from training.step_metrics import TimedIterator
from training.var_loop import VARStage, set_up_var

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.05
SHARD_SAMPLES = 1024
PUBLIC, OURS_ON_CODES = "public, codes in memory", "ours, codes from shards"
BARE, ENCODING = "bare PyTorch loop, codes in memory", "public, images encoded anew"
RIVALS = {"ratio_to_bare": BARE, "ratio_to_encoding": ENCODING}


def benchmark_train(config: BenchmarkConfig) -> list[Row]:
    """Time images a second; the first row is the public code's step on given codes, where it is there."""
    world, tokenizer, model = join_world(), make_tokenizer(config), make_var(config)
    codes, flops = code_batch(var_config(config), config.batch), training_flops(var_config(config))
    with tempfile.TemporaryDirectory() as folder, public_code(config, model, tokenizer) as public:
        contestants = []
        # a GPU has no room for three trainers of d30
        if config.contestants != OURS and (device_type() == "cpu" or public is None):
            bare = bare_step(config, deepcopy(model), tokenizer, codes)
            contestants = [Contestant(BARE, bare, flops, config.precision)]
        batches = TimedIterator(read_batches(config, Path(folder), world))
        step = OurStep(config, model, tokenizer, batches, world)
        ours = Contestant(OURS_ON_CODES, step, flops, config.precision, extra=step.data_wait)
        contestants = [ours, *contestants]
        if public is not None:
            on_codes, on_images = public_steps(config, public, flops, encoding_flops(tokenizer.config))
            contestants = [on_codes, *contestants, on_images]
        return time_in_turns(contestants, config.repeats, rivals=RIVALS)


def public_steps(
    config: BenchmarkConfig, public: PublicCode, flops: float, flops_to_encode: float
) -> tuple[Contestant, Contestant]:
    """Return the public code's step on given codes, and on images that it encodes outside of autocast."""
    given, encoding = (public.timed("train_step", batch=config.batch, encodes=encodes) for encodes in (False, True))
    precision = common_precision(config.precision, "fp32")
    return (
        Contestant(PUBLIC, given, flops, config.precision),
        Contestant(ENCODING, encoding, flops + flops_to_encode, precision),
    )


def engine_config(config: BenchmarkConfig) -> EngineConfig:
    """Return the engine's settings. Unless asked for, there is no ZeRO in fp32; below it stage 1 keeps fp32 weights."""
    return EngineConfig(
        zero_stage=(0 if config.precision == "fp32" else 1) if config.zero_stage is None else config.zero_stage,
        precision=config.precision,
        micro_batch=config.batch,
        compile=config.compile,
        attention=config.attention,
        activation_checkpointing=config.activation_checkpointing,
    )


def read_batches(config: BenchmarkConfig, folder: Path, world: World) -> Iterator[Batch]:
    """Return what this rank of a run reads: random codes from shards in a random order, pinned for a GPU."""
    dataset = make_codes(folder, var_config(config), samples=SHARD_SAMPLES)
    share = {"batch_size": config.batch, "rank": world.rank, "world_size": world.world_size}
    return train_batches(dataset, device=world.device, samples_seen=0, seed=0, **share)


class OurStep:
    """A step as training takes it, DeepSpeed included. On several ranks a collective; the images are this rank's."""

    def __init__(
        self,
        config: BenchmarkConfig,
        model: VAR,
        tokenizer: VQVAE,
        batches: TimedIterator,
        world: World,
    ) -> None:
        """Take the model over, and move the tokenizer's quantiser to its device."""
        engine = engine_config(config)
        set_up_var(model, engine)
        self.batch, self.global_batch = config.batch, config.batch * world.world_size
        optimizer = build_optimizer(model, OptimizerConfig(), undecayed=model.names_without_weight_decay())
        self.stage = VARStage(
            Engine(model, optimizer, engine, global_batch=self.global_batch, world=world),
            place_tokenizer(tokenizer, world.device, kinds={"codes"}),
            label_drop=0.1,
            seed=0,
            validation=lambda: (),
        )
        self.batches = batches
        self.samples_seen = 0
        self.waits: list[tuple[float, float]] = []  # seconds waited for data, and seconds of the whole step

    def __call__(self) -> int:
        start = time.perf_counter()
        self.stage.train_step(self.batches, StepContext(self.samples_seen, 0.5, LEARNING_RATE, WEIGHT_DECAY))
        synchronize()
        self.samples_seen += self.global_batch
        self.waits.append((self.batches.take_waited(), time.perf_counter() - start))
        return self.batch

    def data_wait(self) -> Row:
        """Return the mean wait for data over all steps but the first, which starts the reader."""
        waited, taken = (sum(seconds) for seconds in zip(*self.waits[1:], strict=True))
        return {"data_wait_ms": 1000 * waited / len(self.waits[1:]), "data_wait_share": waited / taken}


def bare_step(config: BenchmarkConfig, model: VAR, tokenizer: VQVAE, batch: Batch) -> Callable[[], int]:
    """Return the least that trains the same model: forward, loss, backward, clipping and AdamW, without DeepSpeed.

    Compilation, checkpointing and attention are those of ours.
    """
    engine = engine_config(config)
    set_up_var(model, engine)
    place_tokenizer(tokenizer, torch.device(device_type()), kinds={"codes"})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    batch = batch.to(torch.device(device_type()))

    def call() -> int:
        inputs = tokenizer.teacher_forcing_inputs(batch.data)
        with torch.autocast(device_type(), dtype=engine.dtype, enabled=config.precision != "fp32"):
            logits = model(inputs, batch.labels)
        F.cross_entropy(logits.float().flatten(0, 1), batch.data.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        return config.batch

    return call
