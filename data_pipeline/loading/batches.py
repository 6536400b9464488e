"""Batches, and how a dataset reads them: a request says which samples a batch has.

Small batches of codes are read several at a time, since each call costs something beside the reading.
Legend: B batch, L codes of one image, S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files.damage import BadSample
from data_pipeline.images.tensors import widen
from data_pipeline.loading.datasets import PackedDataset


@dataclass(frozen=True)
class Batch:
    """The samples of one step. data: images (B, 3, S, S) or codes (B, L); the others (B,), int64, weights float32.

    A loader gives narrow data, a quarter to move: uint8, or int16 (int32 for codes of 16 bits). `to` makes what models
    take, on the device: float32 in [-1, 1], or int64. Positions are those of the training stream, or of the dataset in
    validation. Rows of weight 0 are padding.
    """

    data: Tensor
    labels: Tensor
    positions: Tensor
    weights: Tensor
    bad: tuple[BadSample, ...] = ()  # of the samples of this batch, those that others stand in for

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device, with wide data. The copy is asynchronous if the batch is pinned."""
        moved = self._with_each(lambda part: part.to(device, non_blocking=True))
        return replace(moved, data=widen(moved.data))

    def pinned(self) -> Batch:
        """Copy the batch to memory that a GPU copies from by itself. Needs CUDA."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        labels, positions, weights = map(change, (self.labels, self.positions, self.weights))
        return replace(self, data=change(self.data), labels=labels, positions=positions, weights=weights)


@dataclass(frozen=True)
class Request:
    """The rows of one batch before they are read: stream positions, samples, epochs, weights. Each is (B,)."""

    positions: np.ndarray
    ids: np.ndarray
    epochs: np.ndarray
    weights: np.ndarray

    def __str__(self) -> str:
        return f"samples {self.positions[0]} to {self.positions[-1]} of the stream"


def read_batch(dataset: PackedDataset, request: Request) -> Batch:
    """Read the batch of one request. Raises DamagedData for a damaged sample that no other may replace."""
    data, labels, bad = dataset.read_or_substitute(request.ids, request.epochs)
    return Batch(data, labels, torch.from_numpy(request.positions), torch.from_numpy(request.weights), bad)


def read_batches(dataset: PackedDataset, requests: Iterator[Request], *, together: int) -> Iterator[Batch]:
    """Read the batches of the requests, `together` of them by one call."""
    while group := list(islice(requests, together)):
        yield from _read_group(dataset, group)


def _read_group(dataset: PackedDataset, group: list[Request]) -> Iterator[Batch]:
    """Read a group at once, or singly where something is wrong: each batch has its own errors and bad samples."""
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


def _read_whole(dataset: PackedDataset, group: list[Request]) -> Batch | None:
    """Read all the requests as one batch. None: it cannot be read."""
    joined = (np.concatenate([getattr(request, part.name) for request in group]) for part in fields(Request))
    try:
        return read_batch(dataset, Request(*joined))
    except (OSError, ValueError):  # comes again, and then where it belongs
        return None
