"""The objects that more than one launcher puts together: a pair of models, and datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.datasets import CodeDataset, ImageDataset
from data_pipeline.loading.loader import train_batches, validation_batches
from data_pipeline.shards.index import Index
from data_pipeline.shards.storage import Storage
from launchers.setup.loading import (
    is_weights_file,
    load_tokenizer,
    load_var,
    public_tokenizer,
    public_var,
    tokenizer_of,
    trained_tokenizer_sha256,
)
from launchers.setup.settings import DataConfig, TrainConfig, ViewConfig
from models.generation import check_configs_agree
from models.var import VAR
from models.vqvae import VQVAE, VQVAEConfig
from training.checkpoints.model_on_disk import describe, model_sha256
from training.engine.distributed import World
from training.engine.engine import EngineConfig

Dataset = ImageDataset | CodeDataset


@dataclass(frozen=True)
class Models:
    """A transformer and its tokenizer: frozen, in eval mode, float32, on the CPU."""

    var: VAR
    tokenizer: VQVAE
    tokenizer_sha256: str


def load_models(run: str, tokenizer: str = "", patch_nums: tuple[int, ...] = ()) -> Models:
    """A transformer and the tokenizer it was trained with.

    run: a run folder, a checkpoint, an imported or exported model, or a public .pth file. tokenizer: a folder or a
    public file; empty: the one that `run` names. patch_nums: for a public file with a schedule of its own.

    Raises:
        FileNotFoundError: a model is not there, or no tokenizer is named.
        ValueError: they do not fit together, or the transformer was trained with another tokenizer.
    """
    if is_weights_file(run):
        var = public_var(run, patch_nums)
        trained_with = ""
    else:
        var = load_var(run)
        if patch_nums and patch_nums != var.config.patch_nums:
            raise ValueError(f"patch_nums is {patch_nums}, {run} has {var.config.patch_nums}; leave it out")
        tokenizer = tokenizer or tokenizer_of(run)
        trained_with = trained_tokenizer_sha256(run)
    if not tokenizer:
        raise FileNotFoundError(f"{run}: nothing there names its tokenizer; add --tokenizer PATH")
    found, sha256 = _file_or_folder(tokenizer, var.config.patch_nums)
    if trained_with not in ("", sha256):
        raise ValueError(
            f"{run}: was trained with tokenizer {trained_with[:12]}, this one is {sha256[:12]}; "
            "name the right one with --tokenizer PATH, or train the transformer again"
        )
    check_configs_agree(var.config, found.config)
    return Models(var, found, sha256)


def _file_or_folder(tokenizer: str, patch_nums: tuple[int, ...]) -> tuple[VQVAE, str]:
    if not is_weights_file(tokenizer):
        return load_tokenizer(tokenizer)
    found = public_tokenizer(tokenizer, patch_nums)
    return found, model_sha256(found.state_dict(), describe(found.config))


def image_transform(tokenizer: VQVAEConfig, views: ViewConfig) -> ImageTransform:
    return ImageTransform(tokenizer.image_size, resize_ratio=views.resize_ratio, flip=views.flip)


def open_images(
    folder: str, tokenizer: VQVAEConfig, data: DataConfig, *, seed: int, random_views: bool
) -> ImageDataset:
    """Image shards, here or remote, as the tokenizer wants them."""
    transform = image_transform(tokenizer, data.views)
    storage = Storage(folder, data.cache)
    dataset = ImageDataset(storage, transform, seed=seed, random_views=random_views, max_bad=data.max_bad)
    dataset.try_one()
    return dataset


def open_codes_or_images(
    folder: str, config: TrainConfig, tokenizer: VQVAEConfig, sha256: str, *, random_views: bool
) -> Dataset:
    """Code shards, which must be this tokenizer's, or image shards, which stage 2 then encodes at every step.

    Raises:
        ValueError: made for something else, or with another number of classes than a conditional transformer has.
    """
    storage = Storage(folder, config.data.cache)
    if Index.read(storage).kind == "images":
        dataset: Dataset = open_images(folder, tokenizer, config.data, seed=config.seed, random_views=random_views)
    else:
        dataset = CodeDataset(
            storage,
            patch_nums=tokenizer.patch_nums,
            vocab_size=tokenizer.quantizer.vocab_size,
            tokenizer_sha256=sha256,
            max_bad=config.data.max_bad,
        )
        dataset.try_one()
    if config.model.is_conditional and dataset.num_classes != config.model.num_classes:
        raise ValueError(
            f"{storage}: has {dataset.num_classes} classes, model.num_classes is {config.model.num_classes}; "
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
