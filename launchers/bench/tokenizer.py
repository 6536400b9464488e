"""`benchmark.py tokenizer`: images to codes, codes to images, and a training step of stage 1 without LPIPS.

The rows of each kind of work are compared with its first one, which is the public code where it is there. Nearly all of
the work is convolutions, so on a GPU float32 is set against the peak of TF32, in which cuDNN computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import repeat

from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import code_batch, image_batch, make_tokenizer, make_var, public_code, var_config
from launchers.bench.timing import Contestant, Row, convolution_precision, device_type, synchronize, time_in_turns
from models.vqvae import VQVAE
from training.engine.distributed import World, join_world
from training.engine.engine import Engine, EngineConfig
from training.flops import decoding_flops, encoding_flops, tokenizer_training_flops
from training.losses import ReconstructionLossConfig
from training.optim import OptimizerConfig, build_optimizer
from training.stage import StepContext
from training.tokenizer_loop import CodebookCareConfig, TokenizerStage

import torch
from torch import Tensor

CONTEXT = StepContext(samples_seen=0, progress=0.5, learning_rate=1e-5, weight_decay=0.005)
PIXELS_ALONE = ReconstructionLossConfig(lpips_weight=0.0, adversarial_weight=0.0)


def benchmark_tokenizer(config: BenchmarkConfig) -> list[Row]:
    """Time images a second of encoding, of decoding and of training; training in fp32, as stage 1 is."""
    world, tokenizer = join_world(), make_tokenizer(config)
    with public_code(config, make_var(config), tokenizer) as public:
        tokenizer.to(device_type())
        groups = [encoders(config, tokenizer), decoders(config, tokenizer), [trainer(config, tokenizer, world)]]
        if public is not None:
            for group, what in zip(groups, ("encode", "decode")):
                call = public.timed(what, batch=config.batch)
                group.insert(0, replace(group[0], name=f"public, {what}", call=call))
        return [row for group in groups for row in time_in_turns(group, config.repeats)]


def encoders(config: BenchmarkConfig, tokenizer: VQVAE) -> list[Contestant]:
    """Return ours, and ours with the encoder in channels-last, whose rounding changes few of the codes."""
    images = image_batch(var_config(config), tokenizer.config, config.batch).data.to(device_type())
    turned = deepcopy(tokenizer).to(memory_format=torch.channels_last)
    flops, precision = encoding_flops(tokenizer.config), convolution_precision("fp32")

    def equal_codes() -> Row:
        return {"equal_codes": (turned.encode(images) == tokenizer.encode(images)).float().mean().item()}

    return [
        Contestant("ours, encode", timed(tokenizer.encode, images), flops, precision),
        Contestant("ours, encode, channels-last", timed(turned.encode, images), flops, precision, extra=equal_codes),
    ]


def decoders(config: BenchmarkConfig, tokenizer: VQVAE) -> list[Contestant]:
    """Return ours as it was trained, and prepared: in fp32, and in bf16 where the config asks for it."""
    codes = code_batch(var_config(config), config.batch).data.to(device_type())
    plain, folded = (decoding_flops(tokenizer.config, is_folded=is_folded) for is_folded in (False, True))
    precision = convolution_precision("fp32")
    prepared = deepcopy(tokenizer)
    prepared.prepare_decoder()
    found = [
        Contestant("ours, decode, plain", timed(tokenizer.decode, codes), plain, precision),
        Contestant("ours, decode, prepared", timed(prepared.decode, codes), folded, precision),
    ]
    if config.precision == "bf16":
        halved = deepcopy(tokenizer)
        halved.prepare_decoder(torch.bfloat16)
        found.append(Contestant("ours, decode, prepared, bf16", timed(halved.decode, codes), folded, "bf16"))
    return found


def timed(work: Callable[[Tensor], Tensor], given: Tensor) -> Callable[[], int]:
    """Return a call that ends when the device has done the work."""

    def call() -> int:
        work(given)
        synchronize()
        return len(given)

    return call


def trainer(config: BenchmarkConfig, tokenizer: VQVAE, world: World) -> Contestant:
    """Return a step of stage 1, DeepSpeed included, on a copy of the tokenizer."""
    model = deepcopy(tokenizer).train().requires_grad_(True)
    optimizer = build_optimizer(model, OptimizerConfig())
    settings = EngineConfig(precision="fp32", micro_batch=config.batch, zero_stage=0)
    stage = TokenizerStage(
        Engine(model, optimizer, settings, global_batch=config.batch, world=world),
        PIXELS_ALONE,
        CodebookCareConfig(restart_every=0),
        discriminator=None,
        seed=0,
        validation=lambda: (),
    )
    batches = repeat(image_batch(var_config(config), tokenizer.config, config.batch))

    def call() -> int:
        stage.train_step(batches, CONTEXT)
        synchronize()
        return config.batch

    flops = tokenizer_training_flops(tokenizer.config)
    return Contestant("ours, training step without LPIPS", call, flops, convolution_precision("fp32"))
