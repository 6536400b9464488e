"""`benchmark.py data`: packed codes and images as a training run reads them, and what others make of the same files.

Rows that say "one core" are held to one, with every thread that they start. The first row of a kind is what a run reads
by default; "preads alone" reads as many bytes, in a random order too, and does nothing with them: a limit.
A sample's bytes are those that are read of it, of an image its members with their headers and of codes one view, and
those of what is handed on: one copy, at the least. They are set against what all cores copy in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.images.decoding import image_of
from data_pipeline.images.tensors import widen
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset, ImageDataset
from data_pipeline.loading.loader import train_batches
from data_pipeline.shards.index import Index, Storage
from data_pipeline.shards.reader import ShardReader, load_members
from launchers.bench.config import BenchmarkConfig
from launchers.bench.folders import (
    CODE_SAMPLES,
    CODE_SHARDS,
    VIEWED_SAMPLES,
    VIEWS,
    files_of,
    made_codes,
    made_images,
)
from launchers.bench.loaders import (
    BATCH,
    TRANSFORM,
    ImageFolder,
    on_one_core,
    read_bytes_in_order,
    read_folder,
    read_webdataset,
    take,
)
from launchers.bench.models import var_config
from launchers.bench.timing import Contestant, Row, time_in_turns

SMALL_BATCH, LARGE_BATCH = 16, 256
PASSES = {"codes": 10, "images": 2}  # over the data in a turn, so that the start of what reads ahead is little of it
WORKERS = 2

Calls = dict[str, tuple[Callable[[], int], float]]  # by name: passes over the data, and the bytes of a sample or 0


def benchmark_data(config: BenchmarkConfig) -> list[Row]:
    """Samples a second: codes and images as a run reads them, without checks, by others, and as bytes."""
    with tempfile.TemporaryDirectory() as made:
        folders = [config.folder] if config.folder else _made_folders(Path(made), config)
        rows: list[Row] = []
        for folder in folders:
            kind = Index.read(folder).kind
            calls = code_calls(folder) if kind == "codes" else image_calls(folder, Path(made) / "files")
            contestants = [
                Contestant(f"{kind}, {name}", call, bytes_per_image=moved, bytes_on="cpu")
                for name, (call, moved) in calls.items()
            ]
            rows += time_in_turns(contestants, config.repeats)
    return rows


def _made_folders(made: Path, config: BenchmarkConfig) -> list[str]:
    for name, views, samples in (("codes", 1, CODE_SAMPLES), ("viewed", VIEWS, VIEWED_SAMPLES)):
        made_codes(made / name, var_config(config), views=views, samples=samples, shards=CODE_SHARDS)
    made_images(made / "images")
    return [str(made / name) for name in ("codes", "viewed", "images")]


def code_calls(folder: str) -> Calls:
    """What is timed of code shards."""
    index = Index.read(folder, kind="codes")
    views = f"{index.meta['views']} views, batches of"
    read, narrow, wide = bytes_of(_codes(folder))
    large = partial(_batches, size=LARGE_BATCH)
    calls = {
        f"{views} {BATCH}, one core": on_one_core(_batches(_codes(folder), BATCH)),
        f"{views} {SMALL_BATCH}, one core": on_one_core(_batches(_codes(folder), SMALL_BATCH)),
        f"{views} {LARGE_BATCH}, one core": on_one_core(large(_codes(folder))),
        f"{views} {LARGE_BATCH}, one core, not checked": on_one_core(large(_unchecked(_codes(folder)))),
        f"{views} {LARGE_BATCH}, {WORKERS} processes": large(_codes(folder), workers=WORKERS),
    }
    widened = on_one_core(large(_codes(folder), use=_widened))
    found: Calls = {name: (call, read + narrow) for name, call in calls.items()}
    found[f"{views} {LARGE_BATCH}, one core, as int64"] = (widened, read + wide)
    return found | _byte_calls(folder, index, read)


def image_calls(folder: str, files: Path) -> Calls:
    """What is timed of image shards; `files` is filled with the same images one by one."""
    index = Index.read(folder, kind="images")
    files_of(folder, files)
    passes = PASSES["images"]
    read, narrow, wide = bytes_of(_images(folder))
    folder_of_files = ImageFolder(files, passes=passes)
    others: dict[str, Callable[..., int]] = {"folder, DataLoader and Pillow": partial(read_folder, folder_of_files)}
    if shards := _local_shards(folder, index):
        others["webdataset and Pillow"] = partial(read_webdataset, shards * passes)
    calls = {"as a run reads them, one core": on_one_core(_batches(_images(folder), BATCH, use=_widened))}
    calls["not checked, one core"] = on_one_core(_batches(_unchecked(_images(folder)), BATCH, use=_widened))
    calls |= {f"{name}, one core": on_one_core(partial(call, workers=0)) for name, call in others.items()}
    several = f"{WORKERS} processes"
    calls[f"as a run reads them, {several}"] = _batches(_images(folder), BATCH, workers=WORKERS, use=_widened)
    calls |= {f"{name}, {several}": partial(call, workers=WORKERS) for name, call in others.items()}
    found: Calls = {name: (call, read + wide) for name, call in calls.items()}
    as_bytes = on_one_core(_batches(_images(folder), BATCH))
    found["as bytes on their way to a GPU, one core"] = (as_bytes, read + narrow)
    found["decoded and no more, one core"] = (on_one_core(_decode_all(folder, index)), 0)  # of sides of its own
    return found | _byte_calls(folder, index, read)


def _byte_calls(folder: str, index: Index, read: float) -> Calls:
    """read: the bytes of a sample that a run reads. Others read all of its members."""
    order = _order(index)
    storage = Storage(folder)
    whole = _mean_bytes(_spans(storage, index))
    calls = {"members as bytes, one core": (on_one_core(_read_all(ShardReader(folder, index), order)), 2 * whole)}
    if shards := _local_shards(folder, index):
        calls["preads alone, one core"] = (on_one_core(_preads(folder, index, order)), 2 * read)
        in_order = on_one_core(partial(read_bytes_in_order, shards))
        calls["webdataset in order, as bytes, one core"] = (in_order, 2 * whole)
    return calls


def bytes_of(dataset: CodeDataset | ImageDataset) -> tuple[float, int, int]:
    """Of a sample: the bytes read, on average, and those of data and label as they are read and as models take them."""
    data, labels = dataset.read_narrow(np.array([0]), np.array([0]))
    read = _mean_bytes(_places(dataset.storage, dataset.index))
    return read, data.nbytes + labels.nbytes, widen(data).nbytes + labels.nbytes


def _batches(
    dataset: CodeDataset | ImageDataset, size: int, *, workers: int = 0, use: Callable[[Batch], Batch] | None = None
) -> Callable[[], int]:
    """Passes over the data as `launchers/train.py` reads it, the start of what reads ahead included."""
    number = PASSES[dataset.index.kind] * -(-len(dataset) // size)

    def call() -> int:
        share = {"batch_size": size, "rank": 0, "world_size": 1, "samples_seen": 0, "seed": 0}
        return take(train_batches(dataset, workers=workers, **share), number, use or _as_it_is)

    return call


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _widened(batch: Batch) -> Batch:
    return batch.to("cpu")


def _codes(folder: str) -> CodeDataset:
    meta = Index.read(folder, kind="codes").meta
    return CodeDataset(folder, patch_nums=meta["patch_nums"], vocab_size=meta["vocab_size"], tokenizer_sha256=None)


def _images(folder: str) -> ImageDataset:
    return ImageDataset(folder, TRANSFORM, seed=0, random_views=True)


def _unchecked(dataset: Any) -> Any:
    dataset.reader = ShardReader(dataset.storage, dataset.index, check=False)
    return dataset


def _order(index: Index) -> list[int]:
    return np.random.default_rng(0).permutation(index.num_samples).tolist()


def _read_all(reader: ShardReader, order: list[int]) -> Callable[[], int]:
    return lambda: sum(1 for number in order if reader.read(number))


def _decode_all(folder: str, index: Index) -> Callable[[], int]:
    samples = [ShardReader(folder, index).read(number) for number in _order(index)[:512]]
    return lambda: sum(1 for sample in samples if image_of(sample))


def _preads(folder: str, index: Index, order: list[int]) -> Callable[[], int]:
    """What a run reads of each sample, by one system call, from shards that are open."""
    storage = Storage(folder)
    descriptors = list(map(storage.open, index.shards))
    turns: list[list[tuple[int, int, int]]] = []
    for view in range(max(1, index.record_parts)):  # another in each call, as in each epoch
        shards = zip(descriptors, _places(storage, index, view), strict=True)
        places = [(descriptor, span, start) for descriptor, found in shards for start, span in found]
        turns.append([places[number] for number in order])
    endless = cycle(turns)
    return lambda: sum(1 for place in next(endless) if os.pread(*place))


def _mean_bytes(shards: Iterator[list[tuple[int, int]]]) -> float:
    sizes = [size for places in shards for _, size in places]
    return sum(sizes) / len(sizes)


def _places(storage: Storage, index: Index, view: int = 0) -> Iterator[list[tuple[int, int]]]:
    """For each shard, where in each of its samples is what a run reads, and its bytes: of codes one of the views.

    With each sample it is the next view, so that a pass reads them all alike.
    """
    if index.kind == "images":
        yield from _spans(storage, index)
        return
    views = index.record_parts
    for shard in index.shards:
        table, first = load_members(storage, shard, parts=views)
        records = table[first[:-1]]
        starts, sizes = records["content"].astype(int), records["size"].astype(int) // views
        yield list(zip((starts + (view + np.arange(len(records))) % views * sizes).tolist(), sizes.tolist()))


def _spans(storage: Storage, index: Index) -> Iterator[list[tuple[int, int]]]:
    """For each shard, where its samples start, and their bytes from there to the end of their last member."""
    for shard in index.shards:
        table, first = load_members(storage, shard, parts=index.record_parts)
        ends = table["content"].astype(int) + table["size"].astype(int)
        starts = [int(table["start"][row]) for row in first[:-1]]
        yield [(start, int(ends[after - 1]) - start) for start, after in zip(starts, first[1:], strict=True)]


def _local_shards(folder: str, index: Index) -> list[str]:
    """The paths of shards that lie beside their index, which is where others can read them."""
    here = Path(folder)
    return [str(here / shard.name) for shard in index.shards] if not any(s.location for s in index.shards) else []
