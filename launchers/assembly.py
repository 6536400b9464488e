"""The objects that more than one launcher puts together: tokenizers, datasets, the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.images import ImageTransform
from data_pipeline.index import Index
from data_pipeline.loader import CodeDataset, ImageDataset, train_batches, validation_batches
from launchers.command_line import build_config, say, say_nothing, to_yaml
from launchers.config import TokenizerConfig, TrainConfig, ViewConfig
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
    model = VQVAE(build_config(VQVAEConfig, [found.config("VQVAE")], source=str(found.folder)))
    return found.fill(model), found.sha256()


def load_var(path: str) -> VAR:
    """A trained transformer, from a run folder or an exported model."""
    found = ModelOnDisk.find(path)
    return found.fill(VAR(build_config(VARConfig, [found.config("VAR")], source=str(found.folder))))


def refuse_misfit(var: VARConfig, tokenizer: VQVAEConfig) -> None:
    """Raise ValueError where the transformer's config contradicts its tokenizer's."""
    pairs = {
        "patch_nums": (var.patch_nums, tokenizer.patch_nums),
        "vocab_size": (var.vocab_size, tokenizer.quantizer.vocab_size),
        "code_width": (var.code_width, tokenizer.quantizer.code_width),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise ValueError(f"model.{name} is {ours}, its tokenizer has {theirs}; make them equal or train anew")


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
    """Code shards, which must be this tokenizer's, or image shards, which stage 2 then encodes at every step."""
    if Index.read(Path(folder)).kind == "images":
        return open_images(folder, tokenizer, config.data.views, seed=config.seed, random_views=random_views)
    vocab_size = tokenizer.quantizer.vocab_size
    return CodeDataset(
        Path(folder), patch_nums=tokenizer.patch_nums, vocab_size=vocab_size, tokenizer_sha256=sha256
    )


def validation_source(dataset: Dataset, engine: EngineConfig, world: World) -> Callable[[], Iterable[Any]]:
    """A function that starts a pass over the validation set: this rank's batches, every sample once over all ranks."""
    return lambda: validation_batches(
        dataset, batch_size=engine.micro_batch, rank=world.rank, world_size=world.world_size
    )


def open_checkpoints(config: TrainConfig | TokenizerConfig, world: World) -> Checkpoints:
    """The run folder's checkpoints.

    Raises:
        ValueError: the batch cannot be split over this world, or the newest checkpoint is of another model or world.
    """
    accumulation_steps(config.loop.global_batch, config.engine.micro_batch, world.world_size)
    checkpoints = Checkpoints(
        Path(config.run) / "checkpoints", keep=config.loop.keep_checkpoints, world=world, model_config=config.model
    )
    found = checkpoints.latest()
    if found:
        checkpoints.refuse_misfit(found)
    return checkpoints


def run_stage(
    config: TrainConfig | TokenizerConfig, stage: Stage, dataset: Dataset, checkpoints: Checkpoints, world: World
) -> TrainState:
    """Train a stage in its run folder: from its newest checkpoint if there is one, else from the start."""
    folder = Path(config.run)
    speak = say if world.is_rank_zero else say_nothing
    found = checkpoints.latest()
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

    state = loop.run(state, make_batches)
    if view is not None:
        view.close()
    speak(f"done: step {state.step}, {state.samples_seen} samples seen; record in {record.path}")
    return state
