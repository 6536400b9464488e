"""Speed, measured side by side: `python launchers/benchmark.py data` times reading with and without its checks,
`benchmark.py attention` the ways of block-causal attention.

What is compared is timed in turns within one process, so that a busy machine slows both; a ratio is the median of
those of the turns.
"""

from __future__ import annotations

import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import webdataset  # noqa: E402
from PIL import Image  # noqa: E402

from data_pipeline.codes import CodeFormat  # noqa: E402
from data_pipeline.datasets import CodeDataset  # noqa: E402
from data_pipeline.files import atomic_file  # noqa: E402
from data_pipeline.images import image_of  # noqa: E402
from data_pipeline.index import Index  # noqa: E402
from data_pipeline.members import Sample  # noqa: E402
from data_pipeline.reader import ShardReader  # noqa: E402
from data_pipeline.shards import write_shards  # noqa: E402
from launchers.benchmark_attention import attention_calls  # noqa: E402
from launchers.command_line import Command, run_launcher, say  # noqa: E402
from launchers.config import BenchmarkConfig  # noqa: E402

PAPER_TOKENS = 680
CODE_SAMPLES, IMAGE_SAMPLES = 20_000, 500
IMAGE_SIDE = 288
BATCH = 64

Timed = dict[str, Callable[[], int]]  # name -> a call that returns how many samples it has handled


def launch(command: Command[BenchmarkConfig]) -> None:
    config = command.config
    if command.dry_run:
        say(f"would time {config.what}, {config.repeats} times in turns")
        return
    rows = BENCHMARKED[config.what](config)
    report = {"machine": describe_machine(), "repeats": config.repeats, "rows": rows}
    say(table(rows))
    if config.out:
        with atomic_file(Path(config.out)) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
        say(f"written to {config.out}")


def benchmark_data(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Random reading of codes and of images, with checksums compared and without; WebDataset's own way beside it."""
    rows: list[dict[str, Any]] = []
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
            rows += time_in_turns(calls, config.repeats)
    return rows


def benchmark_attention(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Images a second through one layer's attention, forward and backward, at 680, 2,240 and 9,451 tokens."""
    return [row for calls in attention_calls() for row in time_in_turns(calls, config.repeats)]


BENCHMARKED = {"data": benchmark_data, "attention": benchmark_attention}


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


def time_in_turns(calls: Timed, repeats: int) -> list[dict[str, Any]]:
    """Samples a second of each call, and its speed over the first one's in the same turn; one turn more to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            count = call()
            if turn:
                rates[name].append(count / (time.perf_counter() - start))
    first = next(iter(rates.values()))
    return [
        {
            "name": name,
            "samples_per_second": statistics.median(found),
            "slowest": min(found),
            "fastest": max(found),
            "ratio": statistics.median(one / reference for one, reference in zip(found, first)),
        }
        for name, found in rates.items()
    ]


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


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = [f"{'':32s} {'samples/s':>12s} {'slowest':>12s} {'fastest':>12s} {'ratio':>7s}"]
    for row in rows:
        speeds = "".join(f" {row[name]:12,.1f}" for name in ("samples_per_second", "slowest", "fastest"))
        lines.append(f"{row['name']:32s}{speeds} {row['ratio']:7.3f}")
    return "\n".join(lines)


def describe_machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "machine": platform.machine(), "cores": os.cpu_count(), "device": device}


def main() -> None:
    run_launcher(BenchmarkConfig, launch, __doc__)


if __name__ == "__main__":
    main()
