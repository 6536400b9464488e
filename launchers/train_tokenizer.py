"""Stage 1: train the multi-scale VQVAE. `deepspeed launchers/train_tokenizer.py --config configs/tokenizer.yaml`

The same command again resumes from the newest checkpoint of the run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from launchers.setup.command_line import Command, run_launcher, say
from launchers.setup.assembly import RunData, describe_one_batch, open_images
from launchers.setup.loading import initialize
from launchers.setup.running import Supervision, open_checkpoints, run_stage, supervise
from launchers.setup.settings import RunConfig
from models.discriminator import PatchDiscriminator
from models.vqvae import VQVAEConfig
from training.checkpoints.checkpoint import TrainState
from training.engine.distributed import World, join_world, leave_world
from training.engine.engine import Engine, EngineConfig, accumulation_steps
from training.flops import tokenizer_training_flops
from training.losses import ReconstructionLossConfig, load_lpips
from training.optim import build_optimizer
from training.tokenizer_loop import CodebookCareConfig, DiscriminatorConfig, TokenizerStage, build_tokenizer

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(RunConfig):
    """The settings of a run of stage 1."""

    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    codebook: CodebookCareConfig = field(default_factory=CodebookCareConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


def launch(command: Command[TokenizerConfig]) -> None:
    """Train, or for --dry-run tell what training would need."""
    config, world = command.config, World.from_environment()
    refuse_unfit_engine(config.engine)
    try_what_starts_later(config)
    if command.dry_run:
        dry_run(config, command.world_size or world.world_size)
        return
    with supervise(Path(config.run), config.watch, world) as supervision:
        train(config, world, supervision)


def refuse_unfit_engine(engine: EngineConfig) -> None:
    """Raise ValueError for an engine that cannot train the tokenizer.

    The nearest-code search needs float32, and the quantiser reads its codebook whole, which ZeRO-3 would cut.
    """
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


def try_what_starts_later(config: TokenizerConfig) -> None:
    """Let the discriminator judge one image by shape alone, so that an image too small for it shows before step 1.

    Raises:
        ValueError: it is too small.
    """
    size = config.model.image_size
    if config.loss.adversarial_weight:
        with torch.device("meta"):
            judge = PatchDiscriminator(config.discriminator.width, config.discriminator.num_layers)
            try:
                judge(torch.empty(1, 3, size, size))
            except ValueError as error:
                raise ValueError(
                    f"discriminator.num_layers is {config.discriminator.num_layers}, too many for images of {size} "
                    f"pixels ({error}); choose fewer, or loss.adversarial_weight=0"
                ) from None


def train(config: TokenizerConfig, world: World, supervision: Supervision) -> TrainState:
    """Train the tokenizer of a config to its end, in its run folder; the state there."""
    open_part = partial(open_images, tokenizer=config.model, data=config.data, seed=config.seed)
    training = open_part(config.data.train, random_views=True)
    validation = open_part(config.data.validation, random_views=False)
    data = RunData.of(config, world, training, validation)
    opponent = str(config.discriminator) if config.loss.adversarial_weight else "none"
    checkpoints = open_checkpoints(config, config.model, world, **data.identity, discriminator=opponent)
    model = build_tokenizer(config.model, seed=config.seed)
    initialize(model, config, checkpoints)
    join_world(world, timeout_seconds=config.watch.start_seconds)
    stage = TokenizerStage(
        start_engine(model, config, world),
        config.loss,
        config.codebook,
        discriminator=start_discriminator(config, world) if config.loss.adversarial_weight else None,
        seed=config.seed,
        validation=data.validation_batches,
    )
    state = run_stage(config, stage, data, checkpoints, supervision)
    leave_world()
    return state


def start_engine(model: nn.Module, config: TokenizerConfig, world: World) -> Engine:
    """Put a network on this rank's device and under DeepSpeed, with an optimiser of its own. A collective."""
    optimizer = build_optimizer(model.to(world.device), config.optimizer)
    return Engine(model, optimizer, config.engine, global_batch=config.loop.global_batch, world=world)


def start_discriminator(config: TokenizerConfig, world: World) -> Engine:
    """Build the discriminator and start its engine. A collective."""
    size = config.discriminator
    return start_engine(PatchDiscriminator(size.width, size.num_layers, seed=config.seed), config, world)


def dry_run(config: TokenizerConfig, world_size: int) -> None:
    """Tell what a run would need, without allocating the model; read one batch if the shards are there."""
    accumulation = accumulation_steps(config.loop.global_batch, config.engine.micro_batch, world_size)
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in build_tokenizer(config.model, seed=0).parameters())
    say(f"parameters          {number:,}")
    say(f"FLOPs per image     {tokenizer_training_flops(config.model):.4g} (training, without LPIPS and discriminator)")
    say(f"images              {config.model.image_size} px")
    say(f"tokens per image    {config.model.scales.num_tokens}, scales {config.model.patch_nums}")
    say(f"world               {world_size} x {config.engine.micro_batch} images x {accumulation} accumulated")
    if config.loss.lpips_weight:
        try:
            distance, blank = load_lpips(config.loss.lpips_backbone), torch.zeros(1, 3, *[config.model.image_size] * 2)
            distance(blank, blank)
        except FileNotFoundError as missing:
            say(f"LPIPS               not there yet: {missing}")
    try:
        images = open_images(config.data.train, config.model, config.data, seed=0, random_views=True)
        say(f"data                {describe_one_batch(images, config.engine.micro_batch)}")
    except FileNotFoundError as missing:
        say(f"data                not there yet: {missing}")


def main() -> None:
    run_launcher(TokenizerConfig, launch, __doc__)


if __name__ == "__main__":
    main()
