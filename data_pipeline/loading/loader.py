"""Batches for one rank: plan + shards -> tensors. The whole state is one integer, the number of samples seen.

Micro-step i of a run covers the next batch_size * world_size positions of the training stream, of which each rank takes
one contiguous slice. So every rank has the same number of full batches, and neither the number of ranks nor of workers
changes which samples come in which order. A batch may straddle two epochs; no sample is dropped or repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np
import torch

from data_pipeline.loading.ahead import ThreadAhead, Workers
from data_pipeline.loading.batches import Batch, Request, read_batch, read_batches
from data_pipeline.loading.datasets import PackedDataset
from data_pipeline.loading.plan import WINDOW_SAMPLES, Plan
from data_pipeline.loading.prefetch import Prefetcher, bytes_at_once

AHEAD = 2  # batches that wait, ready, for the step; more where more are read together


class Batches(Iterator[Batch]):
    """The batches of one rank. The dataset of this process is told of the bad samples of each batch as it is taken.

    A worker that reads ahead does not tell it: a run counts what it has been shown.
    """

    def __init__(self, source: Iterator[Batch], dataset: PackedDataset, closing: Sequence[Callable[[], None]] = ()):
        """Pass on the batches of `source`. closing: what ends the reading ahead, to be called in this order."""
        self._source = source
        self._dataset = dataset
        self._closing = closing

    def __next__(self) -> Batch:
        batch = next(self._source)
        if batch.bad:
            self._dataset.note_bad(batch.bad)
        return batch

    def close(self) -> None:
        """End what reads ahead; there are no more batches."""
        self._source = iter(())
        for close in self._closing:
            close()


def first_of_classes(dataset: PackedDataset, classes: Sequence[int]) -> np.ndarray:
    """Find the first sample of each class, in the order asked for. Raises ValueError if a class has no sample."""
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
    dataset: PackedDataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    samples_seen: int,
    seed: int,
    workers: int = 0,
    window: int = WINDOW_SAMPLES,
    device: torch.device | str = "cpu",
) -> Batches:
    """Make the endless batches of one rank, from stream position `samples_seen` on, ahead of their time.

    workers: how many processes read ahead; 0: a thread of this process does, which for codes is more than enough.
    window: samples that are shuffled together. device: where the batches will go: for a GPU they are pinned.
    Close them, or let go of them, to end what reads ahead. Raises ValueError for impossible numbers, and if the cache
    cannot hold the remote shards that are needed at once.
    """
    _check_share(batch_size, rank, world_size)
    if samples_seen < 0 or workers < 0:
        raise ValueError(f"samples_seen is {samples_seen} and workers {workers}, expected 0 or more")
    plan = Plan(dataset.shard_sizes, seed, window)
    first = samples_seen + rank * batch_size
    requests = _train_requests(plan, first=first, batch_size=batch_size, stride=batch_size * world_size)
    closing: list[Callable[[], None]] = []
    if prefetcher := _prefetcher_of(dataset, plan, samples_seen):
        requests = _telling(prefetcher, requests, reach=batch_size * (world_size - rank))
        closing.append(prefetcher.close)
    # What is read together is asked for together: of remote shards, that would be too many to wait for.
    together = 1 if workers or prefetcher else max(1, dataset.read_together // batch_size)
    batches: Iterator[Batch]
    # Threads start after the workers, so that none is in its middle when they are forked.
    if workers:
        batches = processes = Workers(partial(read_batch, dataset), requests, workers=workers)
        closing.append(processes.close)
    else:
        batches = read_batches(dataset.twin(), requests, together=together)
    device, prepare = torch.device(device), None
    if device.type == "cuda":
        batches, prepare = map(Batch.pinned, batches), partial(_use_device, device)
    if device.type == "cuda" or not workers:
        batches = thread = ThreadAhead(batches, ahead=max(AHEAD, together), prepare=prepare)
        closing.insert(0, thread.close)
    return Batches(batches, dataset, closing)


def _prefetcher_of(dataset: PackedDataset, plan: Plan, samples_seen: int) -> Prefetcher | None:
    """Make what fetches remote shards early. None: there are none. Raises ValueError if the cache is too small."""
    storage, shards = dataset.storage, dataset.index.shards
    remote = [shard for shard in shards if storage.is_remote_shard(shard)]
    if not remote:
        return None
    ahead = storage.cache.config.ahead
    storage.cache.check_room(bytes_at_once(remote, window=plan.window, ahead=ahead), window=plan.window)

    def fetch(number: int) -> None:
        if storage.is_remote_shard(shards[number]):
            storage.fetch_early(shards[number])

    needs = Plan(plan.shard_sizes, plan.seed, plan.window).shards_from(samples_seen)  # windows ahead of the requests
    return Prefetcher(fetch, needs, ahead=ahead)


def _telling(prefetcher: Prefetcher, requests: Iterator[Request], *, reach: int) -> Iterator[Request]:
    """Pass requests on. All ranks together are then `reach` positions beyond the first sample of each."""
    for request in requests:
        prefetcher.reached(int(request.positions[0]) + reach)
        yield request


def _use_device(device: torch.device) -> None:
    """Let what this thread pins belong to the device of its rank, or every rank would take memory of the first GPU."""
    if device.index is not None:
        torch.cuda.set_device(device)


def names_of_step(
    dataset: PackedDataset,
    *,
    first: int,
    global_batch: int,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    window: int = WINDOW_SAMPLES,
) -> list[str]:
    """Name the samples that one rank gets in the step that starts at stream position `first`, as shard:key."""
    _check_share(batch_size, rank, world_size)
    plan = Plan(dataset.shard_sizes, seed, window)
    starts = range(first + rank * batch_size, first + global_batch, batch_size * world_size)
    ids = np.concatenate([plan.samples(start, start + batch_size)[0] for start in starts])
    return [f"{dataset.reader.shard_of(number).name}:{dataset.reader.read(number).key}" for number in ids]


def validation_batches(dataset: PackedDataset, *, batch_size: int, rank: int, world_size: int) -> Batches:
    """Show every sample exactly once over all ranks, in a fixed order, in as many batches on every rank.

    Rows beyond the last sample repeat it with weight 0. Raises ValueError without samples.
    """
    _check_share(batch_size, rank, world_size)
    if len(dataset) < 1:
        raise ValueError("the validation data is empty, expected at least one sample; pack the data again")
    requests = _validation_requests(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    return Batches(map(partial(read_batch, dataset), requests), dataset)


def _check_share(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1 sample per rank")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 .. {world_size - 1}")


def _train_requests(plan: Plan, *, first: int, batch_size: int, stride: int) -> Iterator[Request]:
    weights = np.ones(batch_size, dtype=np.float32)
    for start in count(first, stride):
        ids, epochs = plan.samples(start, start + batch_size)
        yield Request(np.arange(start, start + batch_size), ids, epochs, weights)


def _validation_requests(num_samples: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[Request]:
    for start in range(0, num_samples, batch_size * world_size):
        positions = start + rank * batch_size + np.arange(batch_size)
        weights = (positions < num_samples).astype(np.float32)
        ids = np.minimum(positions, num_samples - 1)
        yield Request(positions, ids, np.zeros_like(ids), weights)
