"""`benchmark.py data`: packed codes and images as a training run reads them, and what others make of the same files.

Rows that say "one core" are held to one, with every thread that they start. The first row of a kind is what a run reads
by default. All image rows end at the same: batches of float32 in [-1, 1], short side 288, a random crop of 256, labels.
"""

from __future__ import annotations

import io
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.images.decoding import ImageTransform, encoded_image, label_of, scaled_size
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset, ImageDataset
from data_pipeline.loading.loader import train_batches
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import Sample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import write_shards
from launchers.bench.config import BenchmarkConfig
from launchers.bench.models import make_codes, var_config
from launchers.bench.timing import Contestant, Row, time_in_turns

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CODE_SAMPLES, VIEWED_SAMPLES, IMAGE_SAMPLES = 20_000, 10_000, 1_536
CODE_SHARDS = 128  # as many as pack_images and encode_codes make of ImageNet
VIEWS = 16  # as launchers/encode_codes.py stores of a training image
TRANSFORM = ImageTransform(image_size=256)
IMAGE_CLASSES = 1000
SMALL_BATCH, BATCH, LARGE_BATCH = 16, 64, 256
PASSES = {"codes": 10, "images": 2}  # over the data in a call, so that the start of what reads ahead is little of it
WORKERS = 2
SHUFFLED = 1000  # samples in webdataset's buffer

Calls = dict[str, Callable[[], int]]  # by name, each returns how many samples it has read


def benchmark_data(config: BenchmarkConfig) -> list[Row]:
    """Time samples a second: codes and images as a run reads them, without checks, by others, and as bytes."""
    with tempfile.TemporaryDirectory() as made:
        folders = [Path(config.folder)] if config.folder else make_folders(Path(made), config)
        rows: list[Row] = []
        for folder in folders:
            kind = Index.read(folder).kind
            calls = code_calls(folder) if kind == "codes" else image_calls(folder, Path(made) / "files")
            contestants = [Contestant(f"{kind}, {name}", call) for name, call in calls.items()]
            rows += time_in_turns(contestants, config.repeats)
    return rows


def code_calls(folder: Path) -> Calls:
    """Return what is timed of code shards."""
    meta = Index.read(folder, kind="codes").meta
    names = {"patch_nums": meta["patch_nums"], "vocab_size": meta["vocab_size"], "tokenizer_sha256": None}
    dataset = CodeDataset(folder, **names)
    views = f"{meta['views']} views, batches of"
    large = f"{views} {LARGE_BATCH}"
    calls: Calls = {
        f"{views} {BATCH}, one core": on_one_core(as_a_run(dataset, BATCH)),
        f"{views} {SMALL_BATCH}, one core": on_one_core(as_a_run(dataset, SMALL_BATCH)),
        f"{large}, one core": on_one_core(as_a_run(dataset, LARGE_BATCH)),
        f"{large}, one core, not checked": on_one_core(as_a_run(unchecked(CodeDataset(folder, **names)), LARGE_BATCH)),
        f"{large}, one core, as int64": on_one_core(as_a_run(dataset, LARGE_BATCH, use=widened)),
        f"{large}, {WORKERS} processes": as_a_run(dataset, LARGE_BATCH, workers=WORKERS),
    }
    if shards := local_shards(folder):
        calls["webdataset in order, as bytes, one core"] = on_one_core(partial(read_bytes_in_order, shards))
    return calls


def image_calls(folder: Path, files: Path) -> Calls:
    """Return what is timed of image shards; `files` is filled with the same images one by one."""
    write_files(folder, files)
    dataset = ImageDataset(folder, TRANSFORM, seed=0, random_views=True)
    open_again = ImageDataset(folder, TRANSFORM, seed=0, random_views=True)
    others: dict[str, Callable[..., int]] = {"folder, DataLoader and Pillow": partial(read_folder, files)}
    if shards := local_shards(folder):
        others["webdataset and Pillow"] = partial(read_webdataset, shards)
    return {
        "as a run reads them, one core": on_one_core(as_a_run(dataset, BATCH, use=widened)),
        "not checked, one core": on_one_core(as_a_run(unchecked(open_again), BATCH, use=widened)),
        "as bytes on their way to a GPU, one core": on_one_core(as_a_run(dataset, BATCH)),
        **{f"{name}, one core": on_one_core(partial(call, workers=0)) for name, call in others.items()},
        f"as a run reads them, {WORKERS} processes": as_a_run(dataset, BATCH, workers=WORKERS, use=widened),
        **{f"{name}, {WORKERS} processes": partial(call, workers=WORKERS) for name, call in others.items()},
    }


def as_a_run(
    dataset: CodeDataset | ImageDataset,
    size: int,
    *,
    workers: int = 0,
    use: Callable[[Batch], Any] = lambda batch: None,
) -> Callable[[], int]:
    """Return passes over the data as `launchers/train.py` reads it, the start of what reads ahead included."""
    number = PASSES[dataset.index.kind] * -(-len(dataset) // size)

    def call() -> int:
        batches: Any = train_batches(
            dataset, batch_size=size, rank=0, world_size=1, samples_seen=0, seed=0, workers=workers
        )
        samples = 0
        with closing(batches):
            for batch in islice(batches, number):
                use(batch)
                samples += len(batch.labels)
        return samples

    return call


def widened(batch: Batch) -> Batch:
    """Return the batch in the types that models take on a CPU."""
    return batch.to("cpu")


def unchecked(dataset: Any) -> Any:
    """Return the dataset without comparing what it reads with checksums."""
    dataset.reader.check = False
    return dataset


def read_folder(folder: Path, *, workers: int) -> int:
    """Read all files of a folder of classes in random order by PyTorch's DataLoader."""
    loader = DataLoader(ImageFolder(folder), BATCH, shuffle=True, num_workers=workers)
    return sum(len(labels) for _, labels in loader)


def read_webdataset(shards: list[str], *, workers: int) -> int:
    """Read all shards by WebDataset, shuffled and decoded as its manual has it."""
    shards = shards * PASSES["images"]
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(SHUFFLED)
    samples = samples.to_tuple("jpg;jpeg;png;webp", "cls").map(decode_sample)
    return sum(len(labels) for _, labels in DataLoader(samples, BATCH, num_workers=workers))


def read_bytes_in_order(shards: list[str]) -> int:
    """Read samples as bytes by WebDataset, one after the other."""
    return sum(1 for _ in webdataset.WebDataset(shards, shardshuffle=False))


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Files in folders of classes, decoded by Pillow, as torchvision's class of this name does."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*")) * PASSES["images"]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path = self.files[number]
        with path.open("rb") as file:
            return random_crop(Image.open(file).convert("RGB")), int(path.parent.name)


def decode_sample(sample: tuple[bytes, bytes]) -> tuple[Tensor, int]:
    """Turn the bytes of an image and a label into a crop and a number."""
    content, label = sample
    return random_crop(Image.open(io.BytesIO(content)).convert("RGB")), int(label)


def random_crop(image: Image.Image) -> Tensor:
    """Return a random square of the resized image, (3, 256, 256) float32 in [-1, 1]."""
    image = image.resize(scaled_size(image, TRANSFORM.short_side), Image.Resampling.LANCZOS)
    left, top = (random.randint(0, side - TRANSFORM.image_size) for side in image.size)
    view = image.crop((left, top, left + TRANSFORM.image_size, top + TRANSFORM.image_size))
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).mul_(2).sub_(1)


@contextmanager
def one_core() -> Iterator[None]:
    """Hold this thread, and those that it starts, to one core: no contestant has more of the machine than another."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(allowed)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def on_one_core(call: Callable[[], int]) -> Callable[[], int]:
    """Return the call, held to one core."""

    def held() -> int:
        with one_core():
            return call()

    return held


def make_folders(made: Path, config: BenchmarkConfig) -> list[Path]:
    """Make packed folders: codes with one view, codes with VIEWS, and images."""
    for name, views, number in (("codes", 1, CODE_SAMPLES), ("viewed", VIEWS, VIEWED_SAMPLES)):
        make_codes(made / name, var_config(config), samples=number, views=views, shards=CODE_SHARDS)
    generator = np.random.default_rng(0)
    samples = (
        Sample(f"{i:09d}", {"cls": b"%d" % (i % IMAGE_CLASSES), "jpg": make_jpeg(generator)})
        for i in range(IMAGE_SAMPLES)
    )
    meta = {"classes": [str(label) for label in range(IMAGE_CLASSES)]}
    write_shards(samples, made / "images", kind="images", meta=meta, samples_per_shard=IMAGE_SAMPLES // 2)
    return [made / name for name in ("codes", "viewed", "images")]


def make_jpeg(generator: np.random.Generator) -> bytes:
    """Return a JPEG of smoothed noise with the short side that pack_images leaves, so that it needs no scaling."""
    coarse = Image.fromarray(generator.integers(0, 256, (36, 36, 3), dtype=np.uint8))
    buffer, side = io.BytesIO(), TRANSFORM.short_side
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def write_files(shards: Path, folder: Path) -> None:
    """Write the images of packed shards as files in folders of classes, as other loaders want them."""
    reader = ShardReader(shards, Index.read(shards, kind="images"))
    for number in range(len(reader)):
        sample = reader.read(number)
        place = folder / f"{label_of(sample):04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:09d}.jpg").write_bytes(encoded_image(sample))


def local_shards(folder: Path) -> list[str]:
    """Return the paths of shards that lie beside their index, where others can read them; else nothing."""
    shards = Index.read(folder).shards
    return [] if any(shard.location for shard in shards) else [str(folder / shard.name) for shard in shards]
