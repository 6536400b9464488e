"""Stage 1: train the multi-scale VQVAE. `deepspeed launchers/train_tokenizer.py --config configs/tokenizer.yaml`

The same command again resumes from the newest checkpoint of the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from launchers.setup.assembly import (
    describe_one_batch,
    open_images,
    validation_source,
)
from launchers.setup.command_line import Command, run_launcher, say
from launchers.setup.loading import initialize
from launchers.setup.running import Supervision, open_checkpoints, run_stage, supervise
from launchers.setup.settings import RunConfig
from models.discriminator import PatchDiscriminator
from models.vqvae import VQVAEConfig
from training.engine.distributed import World, join_world, leave_world
from training.engine.engine import Engine, EngineConfig, accumulation_steps
from training.flops import tokenizer_training_flops
from training.losses import ReconstructionLossConfig
from training.optim import build_optimizer
from training.tokenizer_loop import CodebookCareConfig, DiscriminatorConfig, TokenizerStage, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(RunConfig):
    """launchers/train_tokenizer.py: stage 1."""

    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    codebook: CodebookCareConfig = field(default_factory=CodebookCareConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


def launch(command: Command[TokenizerConfig]) -> None:
    refuse_unfit_engine(command.config.engine)
    if command.dry_run:
        dry_run(command.config, command.world_size or World.from_environment().world_size)
    else:
        with supervise(command.config) as supervision:
            train(command.config, supervision)


def refuse_unfit_engine(engine: EngineConfig) -> None:
    """The nearest-code search needs float32, and the quantiser reads its codebook whole."""
    if engine.precision != "fp32":
        raise ValueError(f"engine.precision is {engine.precision}; the tokenizer trains in fp32 only")
    if engine.zero_stage == 3:
        raise ValueError("engine.zero_stage is 3; the tokenizer (109 M parameters) trains with 0, 1 or 2")
    plain = EngineConfig()
    for name in ("activation_checkpointing", "compile"):
        if getattr(engine, name) != getattr(plain, name):
            raise ValueError(
                f"engine.{name} is {getattr(engine, name)}; it has no effect on the tokenizer: leave it out"
            )


def train(config: TokenizerConfig, supervision: Supervision) -> None:
    data = config.data
    dataset = open_images(data.train, config.model, data, seed=config.seed, random_views=True)
    validation = open_images(data.validation, config.model, data, seed=config.seed, random_views=False)
    adversary = str(config.discriminator) if config.loss.adversarial_weight else "none"
    checkpoints = open_checkpoints(
        config, World.from_environment(), data=dataset.index.fingerprint, discriminator=adversary
    )
    model = build_tokenizer(config.model, seed=config.seed)
    initialize(model, config, checkpoints)
    world = join_world(timeout_seconds=config.watch.start_seconds)
    model.to(world.device)
    stage = TokenizerStage(
        start_engine(model, config, world),
        model,
        config.loss,
        config.codebook,
        discriminator=start_discriminator(config, world) if config.loss.adversarial_weight else None,
        global_batch=config.loop.global_batch,
        seed=config.seed,
        world=world,
        validation=validation_source(validation, config.engine, world),
    )
    run_stage(config, stage, dataset, validation, checkpoints, world, supervision)
    leave_world()


def start_engine(model: object, config: TokenizerConfig, world: World) -> Engine:
    optimizer = build_optimizer(model, config.optimizer)
    return Engine(model, optimizer, config.engine, global_batch=config.loop.global_batch, world=world)


def start_discriminator(config: TokenizerConfig, world: World) -> Engine:
    size = config.discriminator
    model = PatchDiscriminator(size.width, size.num_layers, seed=config.seed)
    return start_engine(model.to(world.device), config, world)


def dry_run(config: TokenizerConfig, world_size: int) -> None:
    """Say what a run would need, without allocating the model."""
    accumulation = accumulation_steps(config.loop.global_batch, config.engine.micro_batch, world_size)
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in build_tokenizer(config.model, seed=0).parameters())
    say(f"parameters          {number:,}")
    say(f"FLOPs per image     {tokenizer_training_flops(config.model):.4g} (training, without LPIPS and discriminator)")
    say(f"images              {config.model.image_size} px")
    say(f"tokens per image    {config.model.scales.num_tokens}, scales {config.model.patch_nums}")
    say(f"world               {world_size} x {config.engine.micro_batch} images x {accumulation} accumulated")
    try:
        images = open_images(config.data.train, config.model, config.data, seed=0, random_views=True)
        say(f"data                {describe_one_batch(images, config.engine.micro_batch)}")
    except FileNotFoundError as missing:
        say(f"data                not there yet: {missing}")


def main() -> None:
    run_launcher(TokenizerConfig, launch, __doc__)


if __name__ == "__main__":
    main()
