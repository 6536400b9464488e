"""`benchmark.py data`: packed codes and images as a training run reads them, and what others make of the same files.

Rows that say "one core" are held to one, with every thread that they start. The first row of a kind is what a run reads
by default; "preads alone" reads the same bytes in the same order and does nothing with them: a limit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.datasets import CodeDataset, ImageDataset
from data_pipeline.images import image_of
from data_pipeline.index import Index
from data_pipeline.loader import Batch, train_batches
from data_pipeline.reader import ShardReader, load_members
from data_pipeline.storage import Storage
from launchers.benchmark_config import BenchmarkConfig
from launchers.benchmark_folders import CODE_SAMPLES, VIEWED_SAMPLES, VIEWS, files_of, made_codes, made_images
from launchers.benchmark_loaders import (
    BATCH,
    TRANSFORM,
    ImageFolder,
    on_one_core,
    read_bytes_in_order,
    read_folder,
    read_webdataset,
    take,
)
from launchers.benchmark_timing import Contestant, Row, time_in_turns

LARGE_BATCH = 256
PASSES = {"codes": 5, "images": 2}  # over the data in a turn, so that the start of what reads ahead is little of it
WORKERS = 2

Calls = dict[str, Callable[[], int]]


def benchmark_data(config: BenchmarkConfig) -> list[Row]:
    """Samples a second: codes and images as a run reads them, without checks, by others, and as bytes."""
    with tempfile.TemporaryDirectory() as made:
        folders = [config.folder] if config.folder else _made_folders(Path(made))
        rows: list[Row] = []
        for folder in folders:
            kind = Index.read(folder).kind
            calls = code_calls(folder) if kind == "codes" else image_calls(folder, Path(made) / "files")
            rows += time_in_turns([Contestant(f"{kind}, {name}", call) for name, call in calls.items()], config.repeats)
    return rows


def _made_folders(made: Path) -> list[str]:
    made_codes(made / "codes", views=1, samples=CODE_SAMPLES)
    made_codes(made / "viewed", views=VIEWS, samples=VIEWED_SAMPLES)
    made_images(made / "images")
    return [str(made / name) for name in ("codes", "viewed", "images")]


def code_calls(folder: str) -> Calls:
    """What is timed of code shards."""
    index = Index.read(folder, kind="codes")
    views = f"{index.meta['views']} views, batches of"
    calls: Calls = {
        f"{views} {BATCH}, one core": on_one_core(_batches(_codes(folder), BATCH)),
        f"{views} {LARGE_BATCH}, one core": on_one_core(_batches(_codes(folder), LARGE_BATCH)),
        f"{views} {LARGE_BATCH}, one core, not checked": on_one_core(_batches(_unchecked(_codes(folder)), LARGE_BATCH)),
        f"{views} {LARGE_BATCH}, one core, as int64": on_one_core(_batches(_codes(folder), LARGE_BATCH, use=_widened)),
        f"{views} {LARGE_BATCH}, {WORKERS} processes": _batches(_codes(folder), LARGE_BATCH, workers=WORKERS),
    }
    return calls | _byte_calls(folder, index)


def image_calls(folder: str, files: Path) -> Calls:
    """What is timed of image shards; `files` is filled with the same images one by one."""
    index = Index.read(folder, kind="images")
    files_of(folder, files)
    passes = PASSES["images"]
    folder_of_files = ImageFolder(files, passes=passes)
    others: dict[str, Callable[..., int]] = {"folder, DataLoader and Pillow": partial(read_folder, folder_of_files)}
    if shards := _local_shards(folder, index):
        others["webdataset and Pillow"] = partial(read_webdataset, shards * passes)
    calls: Calls = {"as a run reads them, one core": on_one_core(_batches(_images(folder), BATCH, use=_widened))}
    calls["as bytes on their way to a GPU, one core"] = on_one_core(_batches(_images(folder), BATCH))
    calls["not checked, one core"] = on_one_core(_batches(_unchecked(_images(folder)), BATCH, use=_widened))
    calls |= {f"{name}, one core": on_one_core(partial(call, workers=0)) for name, call in others.items()}
    calls["decoded and no more, one core"] = on_one_core(_decode_all(folder, index))
    several = f"{WORKERS} processes"
    calls[f"as a run reads them, {several}"] = _batches(_images(folder), BATCH, workers=WORKERS, use=_widened)
    calls |= {f"{name}, {several}": partial(call, workers=WORKERS) for name, call in others.items()}
    return calls | _byte_calls(folder, index)


def _byte_calls(folder: str, index: Index) -> Calls:
    order = _order(index)
    calls = {"members as bytes, one core": on_one_core(_read_all(ShardReader(folder, index), order))}
    if shards := _local_shards(folder, index):
        calls["preads alone, one core"] = on_one_core(_preads(folder, index, order))
        calls["webdataset in order, as bytes, one core"] = on_one_core(partial(read_bytes_in_order, shards))
    return calls


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
    """The members of each sample by one system call, from shards that are open."""
    storage, places = Storage(folder), []
    for shard in index.shards:
        table, first = load_members(storage, shard)
        descriptor = storage.open(shard)
        for row, after in zip(first, first[1:]):
            start, last = int(table["start"][row]), table[after - 1]
            places.append((descriptor, int(last["content"]) + int(last["size"]) - start, start))
    wanted = [places[number] for number in order]
    return lambda: sum(1 for place in wanted if os.pread(*place))


def _local_shards(folder: str, index: Index) -> list[str]:
    """The paths of shards that lie beside their index, which is where others can read them."""
    here = Path(folder)
    return [str(here / shard.name) for shard in index.shards] if not any(s.location for s in index.shards) else []
