"""Batches for one rank: plan + shards -> tensors. The whole state is one integer, the number of samples seen.

Micro-step i of a run covers the next batch_size * world_size positions of the training stream, of which each rank takes
one contiguous slice. So every rank has the same number of full batches, and neither the number of ranks nor of workers
changes which samples come in which order. A batch may straddle two epochs; no sample is dropped or repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np
import torch

from data_pipeline.loading.batches import Batch, Dataset, Request, read_batch, read_batches
from data_pipeline.loading.plan import WINDOW_SAMPLES, Plan
from data_pipeline.loading.prefetch import Prefetcher, bytes_at_once
from data_pipeline.loading.read_ahead import ReadAhead
from data_pipeline.loading.read_thread import ThreadAhead

AHEAD = 2  # batches that wait, ready, for the step; more where more are read together


class _Noted(Iterator[Batch]):
    """Passes batches through and lets the dataset of this process know which samples were bad.

    They are noted when a batch is taken, not when a worker reads it ahead: a run counts what it has been shown.
    """

    def __init__(self, batches: Iterator[Batch], dataset: Dataset) -> None:
        self._batches = batches
        self._dataset = dataset

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._dataset.note_bad(batch.bad)
        return batch

    def close(self) -> None:
        if hasattr(self._batches, "close"):
            self._batches.close()


class _Ahead(Iterator[Batch]):
    """Batches, while a thread fetches the remote shards that the next ones will need."""

    def __init__(self, dataset: Dataset, plan: Plan, samples_seen: int) -> None:
        """Raises ValueError if the cache cannot hold the shards that are needed at once."""
        self._storage, self._shards = dataset.storage, dataset.index.shards
        ahead = self._storage.cache.config.ahead
        remote = [shard for shard in self._shards if self._storage.is_remote_shard(shard)]
        room = bytes_at_once(remote, window=plan.window, ahead=ahead)
        self._storage.cache.check_room(room, window=plan.window)
        own_plan = Plan(plan.shard_sizes, plan.seed, plan.window)  # a plan is not for two threads
        self._prefetcher = Prefetcher(self._fetch, own_plan.shards_from(samples_seen), ahead=ahead)
        self._batches: Iterator[Batch] = iter(())

    def told_of(self, requests: Iterator[Request], *, reach: int) -> Iterator[Request]:
        """The requests as they are made; all ranks together are then `reach` positions beyond the first of each."""
        for request in requests:
            self._prefetcher.reached(int(request.positions[0]) + reach)
            yield request

    def start(self, batches: Iterator[Batch]) -> _Ahead:
        self._batches = batches
        self._prefetcher.start()
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        self._prefetcher.close()
        if hasattr(self._batches, "close"):
            self._batches.close()

    def _fetch(self, number: int) -> None:
        if self._storage.is_remote_shard(self._shards[number]):
            self._storage.fetch_early(self._shards[number])


def _has_remote_shards(dataset: Dataset) -> bool:
    return any(map(dataset.storage.is_remote_shard, dataset.index.shards))


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
    dataset: Dataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    samples_seen: int,
    seed: int,
    workers: int = 0,
    window: int = WINDOW_SAMPLES,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The endless batches of one rank, from stream position `samples_seen` on, made ahead of their time.

    workers: how many processes read ahead; 0: a thread of this process does, which for codes is more than enough.
    window: samples that are shuffled together. device: where the batches will go: for a GPU they are pinned.
    Close them, or let go of them, to end what reads ahead.
    """
    _check_share(batch_size, rank, world_size)
    if samples_seen < 0 or workers < 0:
        raise ValueError(f"samples_seen is {samples_seen} and workers {workers}, expected 0 or more")
    plan = Plan(dataset.shard_sizes, seed, window)
    first = samples_seen + rank * batch_size
    requests = _train_requests(plan, first=first, batch_size=batch_size, stride=batch_size * world_size)
    ahead = _Ahead(dataset, plan, samples_seen) if _has_remote_shards(dataset) else None
    if ahead:
        requests = ahead.told_of(requests, reach=batch_size * (world_size - rank))
    batches: Iterator[Batch]
    # what is read together is asked for together, and remote shards are fetched one after the other as they are needed
    together = 1 if workers or ahead else max(1, dataset.read_together // batch_size)
    if workers:
        batches = ReadAhead(partial(read_batch, dataset), requests, workers=workers)
    else:
        batches = read_batches(dataset.twin(), requests, together=together)
    # Threads start after the workers, so that none is in its middle when they are forked.
    batches = _in_thread(batches, torch.device(device), workers=workers, ahead=max(AHEAD, together))
    if ahead:
        batches = ahead.start(batches)
    return _Noted(batches, dataset) if dataset.max_bad else batches


def _in_thread(batches: Iterator[Batch], device: torch.device, *, workers: int, ahead: int) -> Iterator[Batch]:
    """Batches that a thread takes ahead: to read them here, or to pin them; those of workers are ahead as they are.

    ahead: at least those that are read together, which last while the next are read.
    """
    close = batches.close if isinstance(batches, ReadAhead) else None
    if device.type == "cuda":
        prepare = partial(_use_device, device)
        return ThreadAhead(map(Batch.pinned, batches), ahead=ahead, prepare=prepare, close=close)
    return batches if workers else ThreadAhead(batches, ahead=ahead)


def _use_device(device: torch.device) -> None:
    """Let what this thread pins belong to the device of its rank, or every rank would take memory of the first GPU."""
    if device.index is not None:
        torch.cuda.set_device(device)


def names_of_step(
    dataset: Dataset,
    *,
    first: int,
    global_batch: int,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    window: int = WINDOW_SAMPLES,
) -> list[str]:
    """What the samples are called that one rank gets in the step that starts at stream position `first`: shard:key."""
    _check_share(batch_size, rank, world_size)
    plan = Plan(dataset.shard_sizes, seed, window)
    starts = range(first + rank * batch_size, first + global_batch, batch_size * world_size)
    ids = np.concatenate([plan.samples(start, start + batch_size)[0] for start in starts])
    return [f"{dataset.reader.shard_of(number).name}:{dataset.reader.read(number).key}" for number in ids]


def validation_batches(dataset: Dataset, *, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, in a fixed order; the same number of batches on every rank.

    Rows beyond the last sample repeat it with weight 0.
    """
    _check_share(batch_size, rank, world_size)
    if len(dataset) < 1:
        raise ValueError("the validation data is empty, expected at least one sample; pack the data again")
    requests = _validation_requests(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    batches = map(partial(read_batch, dataset), requests)
    return _Noted(batches, dataset) if dataset.max_bad else batches


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
