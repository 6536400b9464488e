"""What more than one launcher puts together: a pair of models, data sets, and the data of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from launchers.setup.command_line import say
from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset, ImageDataset
from data_pipeline.loading.loader import names_of_step, train_batches, validation_batches
from data_pipeline.shards.index import Index, Storage
from launchers.setup.loading import (
    is_weights_file,
    load_tokenizer,
    load_var,
    public_tokenizer,
    public_var,
    tokenizer_of,
    trained_tokenizer_sha256,
)
from launchers.setup.settings import DataConfig, RunConfig, ViewConfig
from models.generation import check_configs_agree
from models.var import VAR
from models.vqvae import VQVAE, VQVAEConfig
from training.checkpoints.model_on_disk import describe, model_sha256
from training.engine.distributed import World

Dataset = ImageDataset | CodeDataset


@dataclass(frozen=True)
class Models:
    """A transformer and its tokenizer: frozen, in eval mode, float32, on the CPU."""

    var: VAR
    tokenizer: VQVAE
    tokenizer_sha256: str


def load_models(run: str, tokenizer: str = "", patch_nums: tuple[int, ...] = ()) -> Models:
    """Load a transformer and the tokenizer it was trained with.

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
    """Make the transform from a picture to a view of the size that a tokenizer takes."""
    return ImageTransform(tokenizer.image_size, resize_ratio=views.resize_ratio, flip=views.flip)


def open_images(
    folder: str, tokenizer: VQVAEConfig, data: DataConfig, *, seed: int, random_views: bool
) -> ImageDataset:
    """Open image shards, here or remote, whose views have the size that a tokenizer takes."""
    transform = image_transform(tokenizer, data.views)
    storage = Storage(folder, data.cache)
    dataset = ImageDataset(storage, transform, seed=seed, random_views=random_views, max_bad=data.max_bad)
    dataset.try_one()
    return dataset


def open_codes_or_images(
    folder: str,
    tokenizer: VQVAEConfig,
    sha256: str,
    data: DataConfig,
    *,
    num_classes: int,
    seed: int,
    random_views: bool,
) -> Dataset:
    """Open code shards, which must be this tokenizer's, or image shards, which stage 2 then encodes at every step.

    num_classes: those of a conditional transformer, which the data must have; 0 for an unconditional one.

    Raises:
        ValueError: made for something else, or with another number of classes.
    """
    storage = Storage(folder, data.cache)
    if Index.read(storage).kind == "images":
        dataset: Dataset = open_images(folder, tokenizer, data, seed=seed, random_views=random_views)
    else:
        dataset = CodeDataset(
            storage,
            patch_nums=tokenizer.patch_nums,
            vocab_size=tokenizer.quantizer.vocab_size,
            tokenizer_sha256=sha256,
            max_bad=data.max_bad,
        )
        dataset.try_one()
    if num_classes and dataset.num_classes != num_classes:
        raise ValueError(
            f"{storage}: has {dataset.num_classes} classes, model.num_classes is {num_classes}; make them equal"
        )
    return dataset


def describe_one_batch(dataset: Dataset, micro_batch: int) -> str:
    """Read the first training batch and describe it in words, for dry runs."""
    batches = train_batches(dataset, batch_size=micro_batch, rank=0, world_size=1, samples_seen=0, seed=0, workers=0)
    batch = next(batches)
    kind = "codes" if batch.data.ndim == 2 else "images"
    labels = f"labels {batch.labels.min()}..{batch.labels.max()}"
    return f"{len(dataset):,} samples; one batch of {kind} {tuple(batch.data.shape)}, {labels}"


def refuse_other_classes(training: Dataset, validation: Dataset) -> None:
    """Check that a class number means the same in both data sets.

    Raises:
        ValueError: it does not; the first class that differs is named.
    """
    ours, theirs = training.index.meta["classes"], validation.index.meta["classes"]
    for label, (name, other) in enumerate(zip_longest(ours, theirs)):
        if name != other:
            raise ValueError(
                f"{validation.folder}: its class {label} is {other}, in {training.folder} it is {name}; pack both from "
                "the same class folders"
            )


@dataclass(frozen=True)
class RunData:
    """The training and validation data of a run, as one rank reads them."""

    training: Dataset
    validation: Dataset
    settings: DataConfig
    world: World
    seed: int
    global_batch: int
    micro_batch: int

    @classmethod
    def of(cls, config: RunConfig, world: World, training: Dataset, validation: Dataset) -> RunData:
        """Share two data sets out among the ranks as a run's settings say."""
        if world.is_rank_zero and training.index.fingerprint == validation.index.fingerprint:
            say(f"warning: {validation.folder} is the training data too, whose loss hides what is learned by heart")
        batches = {"global_batch": config.loop.global_batch, "micro_batch": config.engine.micro_batch}
        return cls(training, validation, config.data, world, config.seed, **batches)

    @property
    def num_samples(self) -> int:
        """Training samples of one epoch."""
        return len(self.training)

    @property
    def identity(self) -> dict[str, str]:
        """What must not change in a run: the fingerprints of both data sets, which hold the names of classes too."""
        return {"data": self.training.index.fingerprint, "validation": self.validation.index.fingerprint}

    @property
    def kinds(self) -> set[str]:
        """Return what the shards hold: "codes", "images", or one each."""
        return {self.training.index.kind, self.validation.index.kind}

    def batches(self, samples_seen: int) -> Iterator[Batch]:
        """Return this rank's endless training batches from a position in the stream of samples on."""
        return train_batches(
            self.training,
            batch_size=self.micro_batch,
            rank=self.world.rank,
            world_size=self.world.world_size,
            samples_seen=samples_seen,
            seed=self.seed,
            workers=self.settings.workers,
            window=self.settings.window,
            device=self.world.device,
        )

    def names(self, first_sample: int) -> list[str]:
        """Return what this rank's samples are called in the step that starts at a stream position."""
        return names_of_step(
            self.training,
            first=first_sample,
            global_batch=self.global_batch,
            batch_size=self.micro_batch,
            rank=self.world.rank,
            world_size=self.world.world_size,
            seed=self.seed,
            window=self.settings.window,
        )

    def validation_batches(self) -> Iterator[Batch]:
        """Start a pass over the validation data: every sample once over all ranks, as many batches on each."""
        return validation_batches(
            self.validation,
            batch_size=self.micro_batch,
            rank=self.world.rank,
            world_size=self.world.world_size,
        )

    def take_bad(self) -> list[dict[str, Any]]:
        """Return the bad samples that this rank has met since the last call."""
        return [asdict(bad) for dataset in (self.training, self.validation) for bad in dataset.take_bad()]
