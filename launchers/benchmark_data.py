"""`benchmark.py data`: random reading of packed codes and images, with their checksums compared and without.

WebDataset's own way, samples as bytes one after the other, stands beside it.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.codes import CodeFormat
from data_pipeline.datasets import CodeDataset
from data_pipeline.images import image_of
from data_pipeline.index import Index
from data_pipeline.members import Sample
from data_pipeline.reader import ShardReader
from data_pipeline.shards import write_shards
from launchers.benchmark_timing import Contestant, Row, time_in_turns
from launchers.config import BenchmarkConfig

PAPER_TOKENS = 680
CODE_SAMPLES, IMAGE_SAMPLES = 20_000, 500
IMAGE_SIDE = 288
BATCH = 64


def benchmark_data(config: BenchmarkConfig) -> list[Row]:
    """Random reading of codes and of images, at samples a second."""
    rows: list[Row] = []
    with data_folders(config.folder) as folders:
        for folder in folders:
            index = Index.read(folder)
            order = np.random.default_rng(0).permutation(index.num_samples).tolist()
            calls = {
                f"{index.kind}, checked": read_all(ShardReader(folder, index), order),
                f"{index.kind}, not checked": read_all(ShardReader(folder, index, check=False), order),
            }
            as_read = decode_all if index.kind == "images" else unpack_all
            calls[f"{index.kind}, as a run reads"] = as_read(ShardReader(folder, index), order)
            calls[f"{index.kind}, the same unchecked"] = as_read(ShardReader(folder, index, check=False), order)
            if not any(shard.location for shard in index.shards):
                urls = [str(Path(folder) / shard.name) for shard in index.shards]
                calls[f"{index.kind}, webdataset in order"] = lambda urls=urls: webdataset_all(urls)
            rows += time_in_turns([Contestant(*named) for named in calls.items()], config.repeats)
    return rows


def read_all(reader: ShardReader, order: list[int]) -> Callable[[], int]:
    return lambda: sum(1 for number in order if reader.read(number))


def decode_all(reader: ShardReader, order: list[int]) -> Callable[[], int]:
    return lambda: sum(1 for number in order if image_of(reader.read(number)))


def unpack_all(reader: ShardReader, order: list[int]) -> Callable[[], int]:
    """Batches of codes as tensors, as the loader makes them."""
    meta = reader.index.meta
    sizes = {"patch_nums": meta["patch_nums"], "vocab_size": meta["vocab_size"]}
    dataset = CodeDataset(reader.storage, **sizes, tokenizer_sha256=None)
    dataset.reader = reader
    batches = [np.array(order[start : start + BATCH]) for start in range(0, len(order), BATCH)]
    return lambda: sum(len(dataset.read(ids, np.zeros_like(ids))[1]) for ids in batches)


def webdataset_all(urls: list[str]) -> int:
    """Samples as bytes, one after the other, which is the way it is made for."""
    return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))


@contextmanager
def data_folders(folder: str) -> Iterator[list[str]]:
    """The folder to read, or made ones: codes as the paper's at 256 pixels, and JPEGs of noise smoothed a little."""
    if folder:
        yield [folder]
        return
    with tempfile.TemporaryDirectory() as made:
        codes, images = Path(made) / "codes", Path(made) / "images"
        generator = np.random.default_rng(0)
        layout = CodeFormat(PAPER_TOKENS, views=1, bits=12)
        records = (
            layout.pack(i % 1000, generator.integers(0, 4096, (1, PAPER_TOKENS))) for i in range(CODE_SAMPLES)
        )
        meta: dict[str, Any] = {"classes": [str(label) for label in range(1000)]}
        layout_meta = {"patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "vocab_size": 4096, "num_tokens": PAPER_TOKENS}
        layout_meta |= {"bits": 12, "views": 1, "tokenizer_sha256": "0" * 64}
        samples = (Sample(f"{i:09d}", {layout.suffix: record}) for i, record in enumerate(records))
        write_shards(samples, codes, kind="codes", meta=meta | layout_meta, samples_per_shard=10_000)
        pictures = (Sample(f"{i:09d}", {"cls": b"%d" % i, "jpg": made_jpeg(generator)}) for i in range(IMAGE_SAMPLES))
        write_shards(pictures, images, kind="images", meta=meta, samples_per_shard=1000)
        yield [str(codes), str(images)]


def made_jpeg(generator: np.random.Generator) -> bytes:
    coarse = Image.fromarray(generator.integers(0, 256, (36, 36, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()
