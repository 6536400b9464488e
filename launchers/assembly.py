"""The objects that more than one launcher puts together: tokenizers, datasets, the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_pipeline.images import ImageTransform
from data_pipeline.index import Index
from data_pipeline.loader import CodeDataset, ImageDataset, train_batches, validation_batches
from launchers.command_line import build_config, say, say_nothing, to_yaml
from launchers.config import RunConfig, TokenizerConfig, TrainConfig, ViewConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig
from training.checkpoint import Checkpoints, ModelOnDisk, TrainState, flatten
from training.distributed import World
from training.engine import EngineConfig, accumulation_steps
from training.loop import Loop, Stage
from training.tracking import MLflowView, RunRecord

Dataset = ImageDataset | CodeDataset


def load_tokenizer(path: str) -> tuple[VQVAE, str]:
    """A trained tokenizer and its sha256, from a run folder or an exported model."""
    found = ModelOnDisk.find(path)
    config = build_config(VQVAEConfig, [found.config("VQVAE")], source=str(found.folder))
    with torch.device("meta"):
        model = VQVAE(config)
    return found.fill(model), found.sha256()


def load_var(path: str) -> VAR:
    """A trained transformer, from a run folder or an exported model."""
    found = ModelOnDisk.find(path)
    config = build_config(VARConfig, [found.config("VAR")], source=str(found.folder))
    with torch.device("meta"):
        model = VAR(config)
    return found.fill(model)


def image_transform(tokenizer: VQVAEConfig, views: ViewConfig) -> ImageTransform:
    return ImageTransform(tokenizer.image_size, resize_ratio=views.resize_ratio, flip=views.flip)


def open_images(
    folder: str, tokenizer: VQVAEConfig, views: ViewConfig, *, seed: int, random_views: bool
) -> ImageDataset:
    """Image shards as the tokenizer wants them."""
    return ImageDataset(Path(folder), image_transform(tokenizer, views), seed=seed, random_views=random_views)


def open_codes_or_images(
    folder: str, config: TrainConfig, tokenizer: VQVAEConfig, sha256: str, *, random_views: bool
) -> Dataset:
    """Code shards, which must be this tokenizer's, or image shards, which stage 2 then encodes at every step.

    Raises:
        ValueError: made for something else, or with another number of classes than the transformer has.
    """
    if Index.read(Path(folder)).kind == "images":
        dataset: Dataset = open_images(
            folder, tokenizer, config.data.views, seed=config.seed, random_views=random_views
        )
    else:
        vocab_size = tokenizer.quantizer.vocab_size
        dataset = CodeDataset(
            Path(folder), patch_nums=tokenizer.patch_nums, vocab_size=vocab_size, tokenizer_sha256=sha256
        )
    if dataset.num_classes != config.model.num_classes:
        raise ValueError(
            f"{folder}: has {dataset.num_classes} classes, model.num_classes is {config.model.num_classes}; "
            "make them equal"
        )
    return dataset


def describe_one_batch(dataset: Dataset, micro_batch: int) -> str:
    """Read the first training batch and say what it is; for dry runs."""
    batches = train_batches(dataset, batch_size=micro_batch, rank=0, world_size=1, samples_seen=0, seed=0, workers=0)
    batch = next(batches)
    kind = "codes" if batch.data.ndim == 2 else "images"
    labels = f"labels {batch.labels.min()}..{batch.labels.max()}"
    return f"{len(dataset):,} samples; one batch of {kind} {tuple(batch.data.shape)}, {labels}"


def validation_source(dataset: Dataset, engine: EngineConfig, world: World) -> Callable[[], Iterable[Any]]:
    """A function that starts a pass over the validation set: this rank's batches, every sample once over all ranks."""
    return lambda: validation_batches(
        dataset, batch_size=engine.micro_batch, rank=world.rank, world_size=world.world_size
    )


def open_checkpoints(config: TrainConfig | TokenizerConfig, world: World, **identity: str) -> Checkpoints:
    """The run folder's checkpoints. `identity`: what else, besides seed and batch, must not change during a run.

    Raises:
        ValueError: the batch cannot be split over this world, or the newest checkpoint is of something else.
    """
    accumulation_steps(config.loop.global_batch, config.engine.micro_batch, world.world_size)
    checkpoints = Checkpoints(
        Path(config.run) / "checkpoints",
        keep=config.loop.keep_checkpoints,
        world=world,
        model_config=config.model,
        identity={"seed": config.seed, "loop.global_batch": config.loop.global_batch, **identity},
    )
    found = checkpoints.latest()
    if found:
        checkpoints.refuse_misfit(found)
    return checkpoints


def run_stage(
    config: RunConfig, stage: Stage, dataset: Dataset, checkpoints: Checkpoints, world: World
) -> TrainState:
    """Train a stage in its run folder: from its newest checkpoint if there is one, else from the start."""
    folder = Path(config.run)
    speak = say if world.is_rank_zero else say_nothing
    found = checkpoints.agreed_latest()
    state = checkpoints.restore(found, stage.engines) if found else TrainState()
    speak(f"resuming from {found}" if found else f"starting in {folder}")
    record = RunRecord(folder)
    view = None
    if world.is_rank_zero:
        (folder / "config.yaml").write_text(to_yaml(config))
        record.forget_after(state.step)
        view = MLflowView(folder, config.tracking, flatten(asdict(config))) if config.tracking.mlflow else None
    loop = Loop(stage, config.loop, config.optimizer, world, len(dataset), record, view, checkpoints, speak)

    def make_batches(samples_seen: int) -> Iterable[Any]:
        return train_batches(
            dataset,
            batch_size=config.engine.micro_batch,
            rank=world.rank,
            world_size=world.world_size,
            samples_seen=samples_seen,
            seed=config.seed,
            workers=config.data.workers,
        )

    failed = True
    try:
        state = loop.run(state, make_batches)
        failed = False
    finally:
        if view is not None:
            view.close(failed=failed)
    speak(f"done: step {state.step}, {state.samples_seen} samples seen; record in {record.path}")
    return state
