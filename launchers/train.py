"""Stage 2: train a VAR transformer. `deepspeed launchers/train.py --config configs/d30.yaml`

The same command again resumes from the newest checkpoint of the run folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launchers.setup.command_line import Command, run_launcher, say
from launchers.setup.assembly import Dataset, RunData, describe_one_batch, open_codes_or_images, refuse_other_classes
from launchers.setup.loading import initialize, load_tokenizer, place_tokenizer
from launchers.setup.running import Supervision, open_checkpoints, run_stage, supervise
from launchers.setup.settings import TrainConfig
from models.generation import check_configs_agree
from models.var import CHECKPOINTINGS
from models.vqvae import VQVAEConfig
from training.checkpoints.checkpoint import TrainState
from training.engine.distributed import World, join_world, leave_world
from training.engine.engine import Engine, accumulation_steps
from training.flops import training_flops
from training.optim import build_optimizer
from training.planning.memory import estimate_memory, largest_micro_batch
from training.planning.step_time import step_time
from training.var_loop import VARStage, build_var


def launch(command: Command[TrainConfig]) -> None:
    """Train, or for --dry-run tell what training would need."""
    config, world = command.config, World.from_environment()
    if command.dry_run:
        dry_run(config, command.world_size or world.world_size)
        return
    with supervise(Path(config.run), config.watch, world) as supervision:
        train(config, world, supervision)


def train(config: TrainConfig, world: World, supervision: Supervision) -> TrainState:
    """Train the transformer of a config to its end, in its run folder; the state there."""
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    check_configs_agree(config.model, tokenizer.config)
    training, validation = (open_data(config, tokenizer.config, sha256, part) for part in ("train", "validation"))
    if config.model.is_conditional:
        refuse_other_classes(training, validation)
    data = RunData.of(config, world, training, validation)
    checkpoints = open_checkpoints(config, config.model, world, tokenizer_sha256=sha256, **data.identity)
    model = build_var(config.model, config.engine, seed=config.seed)
    initialize(model, config, checkpoints)
    join_world(world, timeout_seconds=config.watch.start_seconds)
    model.to(world.device)
    optimizer = build_optimizer(model, config.optimizer, undecayed=model.names_without_weight_decay())
    stage = VARStage(
        Engine(model, optimizer, config.engine, global_batch=config.loop.global_batch, world=world),
        place_tokenizer(tokenizer, world.device, kinds=data.kinds),
        label_drop=config.label_drop,
        seed=config.seed,
        validation=data.validation_batches,
    )
    state = run_stage(config, stage, data, checkpoints, supervision)
    leave_world()
    return state


def open_data(config: TrainConfig, tokenizer: VQVAEConfig, sha256: str, part: str) -> Dataset:
    """Open the part "train" or "validation" of the data; random views are for training alone."""
    return open_codes_or_images(
        getattr(config.data, part),
        tokenizer,
        sha256,
        config.data,
        num_classes=config.model.num_classes,
        seed=config.seed,
        random_views=part == "train",
    )


def dry_run(config: TrainConfig, world_size: int) -> None:
    """Print what a run would need, by arithmetic alone, and read one batch if tokenizer and shards are there."""
    accumulation = accumulation_steps(config.loop.global_batch, config.engine.micro_batch, world_size)
    say(f"parameters          {config.model.num_parameters:,}")
    say(f"FLOPs per image     {training_flops(config.model):.4g} (training, block-causal attention)")
    say(f"tokens per image    {config.model.scales.num_tokens}")
    say(f"world               {world_size} x {config.engine.micro_batch} images x {accumulation} accumulated")
    say_memory(config, world_size)
    say_step_time(config, world_size, accumulation)
    try:
        tokenizer, sha256 = load_tokenizer(config.tokenizer)
        check_configs_agree(config.model, tokenizer.config)
        dataset = open_data(config, tokenizer.config, sha256, "train")
        say(f"data                {describe_one_batch(dataset, config.engine.micro_batch)}")
        if dataset.index.kind == "images":
            say("not modelled        encoding of these images in every step: encode_codes.py does it once and for all")
    except FileNotFoundError as missing:
        say(f"data                not there yet: {missing}")


def say_memory(config: TrainConfig, world_size: int) -> None:
    """Print the memory of a step's worst moment by component, and for each checkpointing the batch that would fit."""
    averages = config.optimizer.ema_decay > 0
    ways = {way: replace(config.engine, activation_checkpointing=way) for way in CHECKPOINTINGS}
    peaks = {way: estimate_memory(config.model, engine, world_size, averages=averages) for way, engine in ways.items()}
    peak = peaks[config.engine.activation_checkpointing].peak
    for name, size in (peak.components | {f"peak, modelled, at the {peak.name}": peak.total}).items():
        say(f"GiB per GPU         {size / 2**30:7.2f}  {name}")
    room = config.cluster.usable_bytes
    for way, engine in ways.items():
        most = largest_micro_batch(config.model, engine, world_size, room, averages=averages)
        total = peaks[way].peak.total / 2**30
        say(f"checkpointing       {way}: {total:.2f} GiB; in {room / 2**30:.1f} GiB fit {most} images a GPU (modelled)")


def say_step_time(config: TrainConfig, world_size: int, accumulation: int) -> None:
    """Print the modelled time of a step on the cluster that the config describes."""
    taken = step_time(
        config.model,
        config.engine,
        config.cluster,
        world_size,
        accumulation=accumulation,
        averages=config.optimizer.ema_decay > 0,
        workers=max(1, config.data.workers),  # without any a thread of this process reads
    )
    say(
        f"step, modelled      {taken.total:.3f} s: {taken.compute:.3f} compute, {taken.recomputation:.3f} recomputed, "
        f"{taken.exposed:.3f} communication in the open, {taken.optimizer:.3f} optimizer, {taken.data_wait:.3f} data"
    )
    say(f"speed, modelled     {taken.images_per_second:,.0f} images/s, MFU {taken.mfu:.0%}")


def main() -> None:
    run_launcher(TrainConfig, launch, __doc__)


if __name__ == "__main__":
    main()
