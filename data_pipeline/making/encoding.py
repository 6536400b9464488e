"""Encode image shards into code shards. The tokenizer is a function from outside; no model is known here.

Each image shard becomes one code shard, with the same keys in the same order, whoever makes it: any number of processes
work on a folder at once, and may be killed and started again.
Legend: B batch, K views, L codes of one image (num_tokens), S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from data_pipeline.files.damage import DamagedData
from data_pipeline.files.hashing import hash_uniform
from data_pipeline.images.decoding import (
    JSON_KEY,
    NUM_THREADS,
    DecodingBudget,
    ImageTransform,
    encoded_image,
    label_of,
    map_in_threads,
    read_header,
)
from data_pipeline.images.tensors import floats_of, pixels_of
from data_pipeline.loading.plan import Stream
from data_pipeline.making.claims import Claims, Entry, first_difference, shard_of
from data_pipeline.making.progress import Progress
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import VERSIONS, Index, is_complete
from data_pipeline.shards.members import most_members
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import KEY, Sample, write_shard

WAITING_BYTES = 2**28  # of crops that wait for the tokenizer, so that threads have work; a batch may wait in any case


@dataclass(frozen=True)
class Recipe:
    """The settings that determine the codes of a set of images.

    One view is the centre crop; more are random crops that depend on (seed, sample, view) alone.
    device: what computes, such as "cpu"; all workers must have the same, since devices round differently.
    """

    transform: ImageTransform
    views: int
    seed: int
    patch_nums: tuple[int, ...]
    vocab_size: int
    tokenizer_sha256: str
    batch_size: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")

    @property
    def format(self) -> CodeFormat:
        """The layout of one image's codes in its member."""
        return CodeFormat.for_vocab(sum(side * side for side in self.patch_nums), self.vocab_size, self.views)

    def meta(self, source: Index) -> dict[str, Any]:
        """Return what the index of the codes says of them."""
        return {
            "patch_nums": list(self.patch_nums),
            "vocab_size": self.vocab_size,
            "num_tokens": self.format.num_tokens,
            "bits": self.format.bits,
            "views": self.views,
            "view": "centre crop" if self.views == 1 else "random crops",
            "image_size": self.transform.image_size,
            "resize_ratio": self.transform.resize_ratio,
            "flip": self.transform.flip and self.views > 1,
            "seed": self.seed,
            "tokenizer_sha256": self.tokenizer_sha256,
            "classes": source.meta["classes"],
            "images_fingerprint": source.fingerprint,
        }

    def check_views(self, source: Index) -> None:
        """Raise ValueError if a shard of these images would have more views than its table of members has room for."""
        largest = max((shard.samples for shard in source.shards), default=0)
        if largest > most_members(self.views):
            raise ValueError(
                f"views is {self.views}, of shards with up to {largest} images each; at most {most_members(self.views)}"
                " images a shard are possible with so many; store fewer, or pack with a smaller samples_per_shard"
            )

    def plan(self, source: Index) -> dict[str, Any]:
        """Return what all workers must agree on, so that they make the same bytes."""
        versions = f"torch {torch.__version__}, Pillow {PIL.__version__}"
        how = {"batch": self.batch_size, "device": self.device, "versions": versions}
        return {**self.meta(source), **how, "index_version": VERSIONS["codes"]}


def is_encoded(out: Path, wanted: dict[str, Any]) -> bool:
    """Tell whether `out` is complete, with these values in its index's meta.

    Raises ValueError if it is complete, but made otherwise; the first difference is named.
    """
    if not is_complete(out):
        return False
    if change := first_difference(Index.read(out, kind="codes").meta, wanted):
        raise ValueError(f"{out}: holds codes with {change}; delete it first")
    return True


@dataclass(frozen=True)
class _Views:
    """The crops of one image, ready to be encoded. crops: (K, 3, S, S)."""

    key: str
    label: int
    crops: Tensor


@dataclass(frozen=True)
class _Encoder:
    """The way from image samples to code samples. Batches are the same on every run: each shard starts a new one."""

    reader: ShardReader
    encode: Callable[[Tensor], Tensor]
    recipe: Recipe
    budget: DecodingBudget = field(default_factory=DecodingBudget)

    def samples(self, ids: range) -> Iterator[Sample]:
        """Encode the images of these numbers, in order."""
        code_format = self.recipe.format
        num_images = max(1, self.recipe.batch_size // self.recipe.views)
        stored = ((sample_id, self.reader.read(sample_id)) for sample_id in ids)
        fit = WAITING_BYTES // (self.recipe.views * 3 * self.recipe.transform.image_size**2 * 4)  # float32
        images = map_in_threads(self._views, stored, ahead=max(num_images, min(fit, NUM_THREADS)))
        while chunk := list(islice(images, num_images)):
            codes = self._codes(torch.cat([image.crops for image in chunk]))
            for image, rows in zip(chunk, codes.reshape(len(chunk), self.recipe.views, -1), strict=True):
                yield Sample(image.key, {code_format.suffix: code_format.pack(image.label, rows)})

    def _views(self, stored: tuple[int, Sample]) -> _Views:
        sample_id, sample = stored
        try:
            label = label_of(sample, self.reader.index.meta.get("json_label", JSON_KEY))
            crops = self._crops(sample_id, encoded_image(sample))
        except ValueError as error:
            place = self.reader.path_of(sample_id)
            raise DamagedData(
                f"{place}: sample {sample.key}: {error}; pack these images again, or index"
                " them with --decode true, which leaves out and lists what cannot be decoded"
            ) from error
        # Other people's keys may have slashes and be longer than ours.
        return _Views(sample.key if KEY.fullmatch(sample.key) else f"_{sample_id:09d}", label, crops)

    def _crops(self, sample_id: int, data: bytes) -> Tensor:
        """Decode one image and crop its views: (K, 3, S, S)."""
        transform, views = self.recipe.transform, self.recipe.views
        with self.budget.decoded(read_header(data)) as image:
            if views == 1:
                return floats_of(pixels_of(transform.center_crop(image)))[None]
            numbers = np.arange(views)
            uniforms = hash_uniform(self.recipe.seed, Stream.CROP, np.full_like(numbers, sample_id), numbers, 3)
            return torch.stack([floats_of(pixels_of(transform.random_crop(image, row))) for row in uniforms])

    @torch.inference_mode()
    def _codes(self, crops: Tensor) -> np.ndarray:
        """Encode crops (N, 3, S, S) into (N, L) int64. Raises ValueError if these are not codes of this vocabulary."""
        codes = torch.cat([self.encode(part).cpu() for part in crops.split(self.recipe.batch_size)]).numpy()
        expected, vocab_size = (len(crops), self.recipe.format.num_tokens), self.recipe.vocab_size
        if codes.shape != expected:
            raise ValueError(f"the tokenizer gave codes of shape {codes.shape}, expected {expected}; see patch_nums")
        if codes.min() < 0 or codes.max() >= vocab_size:
            raise ValueError(f"the tokenizer gave codes {codes.min()} .. {codes.max()}, vocab_size {vocab_size}")
        return codes


class Encoding:
    """The encoding of a packed image split by this process, together with whoever else encodes it."""

    def __init__(
        self,
        images: str | Path,
        out: Path,
        recipe: Recipe,
        *,
        encode: Callable[[Tensor], Tensor],
        report: Callable[[str], None] = print,
    ) -> None:
        """Lay down the work, or join it.

        encode: (B, 3, S, S) float32 in [-1, 1], on the CPU, B <= recipe.batch_size -> (B, L) codes on any device.
        Raises ValueError if `out` holds, or is to hold, other codes, and for more views than a shard has room for.
        """
        source = Index.read(images, kind="images")
        recipe.check_views(source)
        first_ids = accumulate((shard.samples for shard in source.shards), initial=0)
        self._ids = {
            shard.name.removesuffix(".tar"): range(first, first + shard.samples)
            for shard, first in zip(source.shards, first_ids, strict=False)  # the last sum begins no shard
        }
        self._out = Path(out)
        self._meta = recipe.meta(source)
        self._report = report
        self._encoder = _Encoder(ShardReader(images, source), encode, recipe)
        self._claims = Claims(
            self._out, list(self._ids), plan=recipe.plan(source), is_finished=lambda: is_complete(out), report=report
        )
        if not is_encoded(self._out, self._meta):
            self._claims.open()
        sizes = {name: len(ids) for name, ids in self._ids.items()}
        self._progress = Progress(self._claims, sizes, report=report)

    def work(self) -> None:
        """Encode what nobody works on. Raises as `finish` does."""
        if not is_complete(self._out):
            self._claims.work(self._make)

    def finish(self) -> Index:
        """Encode, and take over what others drop, until all is done; return the index.

        Raises ValueError if the codes do not fit patch_nums or vocab_size, and DamagedData if an image is damaged.
        """
        self._claims.finish(self._make, self._merge)
        self._report(f"{self._out}: {self._progress.summary()}")
        is_encoded(self._out, self._meta)  # by others, perhaps, who did not wait for us
        return Index.read(self._out, kind="codes")

    def _make(self, name: str) -> Entry:
        if not self._ids[name]:
            return {"shard": None}
        samples = self._progress.counted(self._encoder.samples(self._ids[name]), _num_bytes)
        shard = write_shard(samples, self._out / f"{name}.tar", parts=self._encoder.recipe.views)
        return {"shard": shard.to_json()}

    def _merge(self) -> None:
        found = [shard_of(self._claims.entry(name)) for name in self._ids]
        index = Index("codes", tuple(shard for shard in found if shard is not None), self._meta)
        expected = self._encoder.reader.index.num_samples
        assert index.num_samples == expected, f"{index.num_samples} codes of {expected} images"
        index.write(self._out)


def _num_bytes(sample: Sample) -> int:
    return sum(map(len, sample.members.values()))
