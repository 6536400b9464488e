"""Batches and how they are read: which samples a batch has is asked for by a request, the data set reads them.

Small batches of codes are read several at a time. Legend: B batch, L codes of one image, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files.damage import BadSample
from data_pipeline.images.tensors import widen
from data_pipeline.shards.index import Index, Storage
from data_pipeline.shards.reader import ShardReader


@dataclass(frozen=True)
class Batch:
    """data: images (B, 3, S, S) or codes (B, L); the others (B,), int64, weights float32.

    As it comes from a loader, data is narrow: uint8, or int16 (int32 for codes of 16 bits), which is a quarter to move.
    `to` makes what models take, on the device: float32 in [-1, 1], or int64.
    positions are those of the training stream, or of the data set in validation. Rows of weight 0 are padding.
    """

    data: Tensor
    labels: Tensor
    positions: Tensor
    weights: Tensor
    bad: tuple[BadSample, ...] = ()  # of the samples of this batch, those that others stand in for

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, with wide data. The copy is asynchronous if the batch is pinned."""
        moved = self._with_each(lambda part: part.to(device, non_blocking=True))
        return replace(moved, data=widen(moved.data))

    def pinned(self) -> Batch:
        """The batch in memory that a GPU copies from by itself. Needs CUDA."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("data", "labels", "positions", "weights")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


class Dataset(Protocol):
    """What the loader needs: sizes, and samples by number and epoch."""

    folder: str
    storage: Storage
    index: Index
    num_classes: int
    reader: ShardReader
    max_bad: int
    read_together: int

    def __len__(self) -> int: ...

    @property
    def shard_sizes(self) -> tuple[int, ...]: ...

    def read_or_substitute(
        self, ids: np.ndarray, epochs: np.ndarray
    ) -> tuple[Tensor, Tensor, tuple[BadSample, ...]]: ...

    def label(self, sample_id: int) -> int: ...

    def note_bad(self, bad: tuple[BadSample, ...]) -> None: ...

    def twin(self) -> Dataset: ...


@dataclass(frozen=True)
class Request:
    """The rows of one batch before they are read: stream positions, what stands there, and its weight. Each (B,)."""

    positions: np.ndarray
    ids: np.ndarray
    epochs: np.ndarray
    weights: np.ndarray

    def __str__(self) -> str:
        return f"samples {self.positions[0]} to {self.positions[-1]} of the stream"


def read_batch(dataset: Dataset, request: Request) -> Batch:
    """The batch of one request. Raises DamagedData for a sample that is not as it was and that no other may replace."""
    data, labels, bad = dataset.read_or_substitute(request.ids, request.epochs)
    return Batch(data, labels, torch.from_numpy(request.positions), torch.from_numpy(request.weights), bad)


def read_batches(dataset: Dataset, requests: Iterator[Request], *, together: int) -> Iterator[Batch]:
    """The batches of the requests, so many read by one call, whose cost beside the reading small batches share."""
    while group := list(islice(requests, together)):
        yield from _read_group(dataset, group)


def _read_group(dataset: Dataset, group: list[Request]) -> Iterator[Batch]:
    """Where something is wrong, batches are read one by one: each has its own errors and bad samples."""
    whole = _read_whole(dataset, group) if len(group) > 1 else None
    if whole is None:
        yield from map(partial(read_batch, dataset), group)
        return
    bad, start = {sample.sample for sample in whole.bad}, 0
    for request in group:
        rows = slice(start, start + len(request.ids))
        if bad and not bad.isdisjoint(request.ids.tolist()):
            yield read_batch(dataset, request)
        else:
            yield Batch(whole.data[rows], whole.labels[rows], whole.positions[rows], whole.weights[rows])
        start = rows.stop


def _read_whole(dataset: Dataset, group: list[Request]) -> Batch | None:
    """All the requests as one batch; None where it cannot be read."""
    joined = (np.concatenate([getattr(request, part.name) for request in group]) for part in fields(Request))
    try:
        return read_batch(dataset, Request(*joined))
    except (OSError, ValueError):  # comes again, and then where it belongs
        return None
