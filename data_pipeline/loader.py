"""Batches for one rank: plan + shards -> tensors. The whole state is one integer, the number of samples seen.

Micro-step i of a run covers the next batch_size * world_size positions of the training stream, of which each rank takes
one contiguous slice. So every rank has the same number of full batches, and neither the number of ranks nor of workers
changes which samples come in which order. A batch may straddle two epochs; no sample is dropped or repeated.
Legend: B batch, L codes of one image, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.codes import CodeFormat
from data_pipeline.images import ImageTransform, image_of, label_of
from data_pipeline.index import Index
from data_pipeline.plan import Plan, Stream, hash_uniform
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.shards import Sample, ShardReader


@dataclass(frozen=True)
class Batch:
    """data: (B, 3, S, S) float32 in [-1, 1], or codes (B, L) int64; the others (B,), int64, weights float32.

    positions are those of the training stream, or of the data set in validation. Rows of weight 0 are padding.
    """

    data: Tensor
    labels: Tensor
    positions: Tensor
    weights: Tensor

    def to(self, device: torch.device | str) -> Batch:
        names = ("data", "labels", "positions", "weights")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


class Dataset(Protocol):
    """What the loader needs: sizes, and samples by number and epoch."""

    folder: Path
    index: Index
    num_classes: int
    reader: ShardReader

    def __len__(self) -> int: ...

    @property
    def shard_sizes(self) -> tuple[int, ...]: ...

    def read(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]: ...

    def label(self, sample_id: int) -> int: ...


class _PackedDataset:
    """What images and codes share: an index, its shards, and labels that must be classes."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = Path(folder)
        self.index = index
        self.reader = ShardReader(folder, index)
        self.num_classes = len(index.meta["classes"])

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.index.shards)

    def _checked_labels(self, labels: Sequence[int] | np.ndarray, ids: np.ndarray) -> Tensor:
        labels = np.asarray(labels, dtype=np.int64)
        for sample_id in ids[labels >= self.num_classes]:
            raise ValueError(
                f"{self.reader.path_of(sample_id)}: sample {sample_id} has a label that is not one of the"
                f" {self.num_classes} classes in the index; pack this data again"
            )
        return torch.from_numpy(labels)


class ImageDataset(_PackedDataset):
    """Images of a packed folder: a fresh random view in every epoch, or always the centre view."""

    def __init__(self, folder: Path, transform: ImageTransform, *, seed: int, random_views: bool) -> None:
        """Raises FileNotFoundError or ValueError if the folder is not a complete set of image shards."""
        super().__init__(folder, Index.read(folder, kind="images"))
        self.transform = transform
        self.seed = seed
        self.random_views = random_views

    def read(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """ids, epochs: (B,) -> images (B, 3, S, S) float32 in [-1, 1], labels (B,) int64."""
        uniforms = hash_uniform(self.seed, Stream.CROP, ids, epochs, 3)
        views, labels = zip(*(self._view_and_label(sample_id, row) for sample_id, row in zip(ids, uniforms)))
        return torch.stack(views), self._checked_labels(labels, ids)

    def label(self, sample_id: int) -> int:
        """The class of a sample, without decoding its image."""
        sample = self.reader.read(sample_id)
        try:
            return label_of(sample)
        except ValueError as error:
            raise ValueError(f"{self.reader.path_of(sample_id)}: sample {sample.key}: {error}") from error

    def _view_and_label(self, sample_id: int, uniforms: np.ndarray) -> tuple[Tensor, int]:
        sample = self.reader.read(sample_id)
        try:
            image, label = image_of(sample), label_of(sample)
        except ValueError as error:
            raise ValueError(f"{self.reader.path_of(sample_id)}: sample {sample.key}: {error}") from error
        view = self.transform.random_view(image, uniforms) if self.random_views else self.transform.center_view(image)
        return view, label


class CodeDataset(_PackedDataset):
    """Codes of a packed folder. Of K stored views, K epochs show each sample each view once, in an order of its own."""

    def __init__(
        self, folder: Path, *, patch_nums: Sequence[int], vocab_size: int, tokenizer_sha256: str | None
    ) -> None:
        """Raises FileNotFoundError or ValueError if the folder is incomplete or its codes were made for something else.

        tokenizer_sha256 None: any tokenizer will do, for measurements that never decode.
        """
        super().__init__(folder, Index.read(folder, kind="codes"))
        wanted = {"patch_nums": list(patch_nums), "vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
        for name, want in wanted.items():
            got = self.index.meta[name]
            if want is not None and got != want:
                raise ValueError(
                    f"{folder}: codes made with {name} {got}, this run uses {want};"
                    " re-run launchers/encode_codes.py or change the config"
                )
        self.vocab_size = vocab_size
        self.format = CodeFormat(self.index.meta["num_tokens"], self.index.meta["views"], self.index.meta["bits"])

    def read(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """ids, epochs: (B,) -> codes (B, L) int64, labels (B,) int64."""
        records = [self._record(sample_id) for sample_id in ids]
        labels, codes = self.format.unpack_views(records, self._views(ids, epochs))
        if codes.max() >= self.vocab_size:
            worst = ids[codes.max(axis=1).argmax()]
            raise ValueError(
                f"{self.reader.path_of(worst)}: sample {worst} has code {codes.max()}, vocab_size is {self.vocab_size};"
                " re-run launchers/encode_codes.py"
            )
        return torch.from_numpy(np.ascontiguousarray(codes)), self._checked_labels(labels, ids)

    def label(self, sample_id: int) -> int:
        """The class of a sample."""
        return self.format.unpack_view(self._record(sample_id), 0)[0]

    def _record(self, sample_id: int) -> bytes:
        sample: Sample = self.reader.read(sample_id)
        record = sample.members.get(self.format.suffix)
        if record is None or len(record) != self.format.record_bytes:
            raise ValueError(
                f"{self.reader.path_of(sample_id)}: sample {sample.key} has no {self.format.suffix} member of"
                f" {self.format.record_bytes} bytes; re-run launchers/encode_codes.py"
            )
        return record

    def _views(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """The view each sample shows in its epoch: a permutation of the K views for each sample and K epochs."""
        cycles, turns = np.divmod(epochs, self.format.views)
        order = np.argsort(hash_uniform(0, Stream.VIEW, ids, cycles, self.format.views), axis=1)  # (B, K)
        return order[np.arange(len(ids)), turns]


@dataclass(frozen=True)
class _Request:
    """The rows of one batch before they are read: stream positions, what stands there, and its weight. Each (B,)."""

    positions: np.ndarray
    ids: np.ndarray
    epochs: np.ndarray
    weights: np.ndarray

    def __str__(self) -> str:
        return f"samples {self.positions[0]} to {self.positions[-1]} of the stream"


def _read_batch(dataset: Dataset, request: _Request) -> Batch:
    data, labels = dataset.read(request.ids, request.epochs)
    return Batch(data, labels, torch.from_numpy(request.positions), torch.from_numpy(request.weights))


def first_of_classes(dataset: Dataset, classes: Sequence[int]) -> np.ndarray:
    """The number of the first sample of each class, in the order asked for. Raises ValueError if one has no sample."""
    first: dict[int, int] = {}
    for sample_id in range(len(dataset)):
        if first.keys() >= set(classes):
            break
        first.setdefault(dataset.label(sample_id), sample_id)
    for label in classes:
        if label not in first:
            raise ValueError(
                f"{dataset.folder}: has no sample of class {label}, of {dataset.num_classes} classes; ask for another"
            )
    return np.array([first[label] for label in classes])


def train_batches(
    dataset: Dataset, *, batch_size: int, rank: int, world_size: int, samples_seen: int, seed: int, workers: int = 0
) -> Iterator[Batch]:
    """The endless batches of one rank, from stream position `samples_seen` on.

    workers: how many processes read ahead; 0 reads in this process, which for codes is enough.
    """
    _check_share(batch_size, rank, world_size)
    if samples_seen < 0 or workers < 0:
        raise ValueError(f"samples_seen is {samples_seen} and workers {workers}, expected 0 or more")
    plan = Plan(dataset.shard_sizes, seed)
    first = samples_seen + rank * batch_size
    requests = _train_requests(plan, first=first, batch_size=batch_size, stride=batch_size * world_size)
    read = partial(_read_batch, dataset)
    return map(read, requests) if workers == 0 else ReadAhead(read, requests, workers=workers)


def names_of_step(
    dataset: Dataset, *, first: int, global_batch: int, batch_size: int, rank: int, world_size: int, seed: int
) -> list[str]:
    """What the samples are called that one rank gets in the step that starts at stream position `first`: shard:key."""
    _check_share(batch_size, rank, world_size)
    plan = Plan(dataset.shard_sizes, seed)
    starts = range(first + rank * batch_size, first + global_batch, batch_size * world_size)
    ids = np.concatenate([plan.samples(start, start + batch_size)[0] for start in starts])
    return [f"{dataset.reader.path_of(number).name}:{dataset.reader.read(number).key}" for number in ids]


def validation_batches(dataset: Dataset, *, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, in a fixed order; the same number of batches on every rank.

    Rows beyond the last sample repeat it with weight 0.
    """
    _check_share(batch_size, rank, world_size)
    if len(dataset) < 1:
        raise ValueError("the validation data is empty, expected at least one sample; pack the data again")
    requests = _validation_requests(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    return map(partial(_read_batch, dataset), requests)


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1 sample per rank")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 .. {world_size - 1}")


def _train_requests(plan: Plan, *, first: int, batch_size: int, stride: int) -> Iterator[_Request]:
    weights = np.ones(batch_size, dtype=np.float32)
    for start in count(first, stride):
        ids, epochs = plan.samples(start, start + batch_size)
        yield _Request(np.arange(start, start + batch_size), ids, epochs, weights)


def _validation_requests(num_samples: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[_Request]:
    for start in range(0, num_samples, batch_size * world_size):
        positions = start + rank * batch_size + np.arange(batch_size)
        weights = (positions < num_samples).astype(np.float32)
        ids = np.minimum(positions, num_samples - 1)
        yield _Request(positions, ids, np.zeros_like(ids), weights)
