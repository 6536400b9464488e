"""From image shards to code shards. The tokenizer is a function from outside; no model is known here.

Legend: B batch, K views, L codes of one image (num_tokens), S image size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.codes import CodeFormat
from data_pipeline.images import ImageTransform, image_of, label_of, map_in_threads
from data_pipeline.index import Index, ShardEntry, refuse_complete
from data_pipeline.plan import Stream, hash_uniform
from data_pipeline.shards import Sample, ShardReader, write_shard


def write_codes(
    images: Path,
    out: Path,
    *,
    encode: Callable[[Tensor], Tensor],
    transform: ImageTransform,
    views: int,
    seed: int,
    patch_nums: Sequence[int],
    vocab_size: int,
    tokenizer_sha256: str,
    batch_size: int,
    report: Callable[[str], None] = print,
) -> Index:
    """Encode a packed image split: one code shard for each image shard, with the same keys in the same order.

    encode: (B, 3, S, S) float32 in [-1, 1], on the CPU, B <= batch_size -> (B, L) codes on any device.
    One view is the centre crop; more are random crops that depend on (seed, sample, view) alone.
    Raises ValueError if `out` is already packed, an image is damaged, or the codes do not fit patch_nums or vocab_size.
    """
    refuse_complete(out)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    source = Index.read(images, kind="images")
    num_tokens = sum(side * side for side in patch_nums)
    code_format = CodeFormat.for_vocab(num_tokens, vocab_size, views)
    meta = {
        "patch_nums": list(patch_nums),
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "bits": code_format.bits,
        "views": views,
        "view": "centre crop" if views == 1 else "random crops",
        "image_size": transform.image_size,
        "resize_ratio": transform.resize_ratio,
        "flip": transform.flip and views > 1,
        "seed": seed,
        "tokenizer_sha256": tokenizer_sha256,
        "classes": source.meta["classes"],
        "images_fingerprint": source.fingerprint,
    }
    reader = ShardReader(images, source)
    encoder = _Encoder(reader, encode, transform, code_format, vocab_size, seed, batch_size)
    index = Index("codes", _write_code_shards(encoder, Path(out), report), meta)
    index.write(out)
    return index


def _write_code_shards(encoder: _Encoder, out: Path, report: Callable[[str], None]) -> tuple[ShardEntry, ...]:
    out.mkdir(parents=True, exist_ok=True)
    source = encoder.reader.index
    shards: list[ShardEntry] = []
    num_done = 0
    for shard in source.shards:
        ids = range(num_done, num_done + shard.samples)
        shards.append(write_shard(encoder.samples(ids), out / shard.name))
        num_done += shard.samples
        report(f"{out.name}: {num_done} of {source.num_samples} images encoded")
    return tuple(shards)


@dataclass(frozen=True)
class _Views:
    """One image ready to be encoded. crops: (K, 3, S, S)."""

    key: str
    label: int
    crops: Tensor


@dataclass(frozen=True)
class _Encoder:
    """Image samples in, code samples out. Batches are the same on every run: each shard starts a new one."""

    reader: ShardReader
    encode: Callable[[Tensor], Tensor]
    transform: ImageTransform
    format: CodeFormat
    vocab_size: int
    seed: int
    batch_size: int

    def samples(self, ids: range) -> Iterator[Sample]:
        num_images = max(1, self.batch_size // self.format.views)
        stored = ((sample_id, self.reader.read(sample_id)) for sample_id in ids)
        images = map_in_threads(self._views, stored, at_once=num_images)
        while chunk := list(islice(images, num_images)):
            codes = self._codes(torch.cat([image.crops for image in chunk]))
            for image, rows in zip(chunk, codes.reshape(len(chunk), self.format.views, -1)):
                yield Sample(image.key, {self.format.suffix: self.format.pack(image.label, rows)})

    def _views(self, stored: tuple[int, Sample]) -> _Views:
        sample_id, sample = stored
        try:
            image, label = image_of(sample), label_of(sample)
        except ValueError as error:
            raise ValueError(f"{self.reader.path_of(sample_id)}: sample {sample.key}: {error}") from error
        if self.format.views == 1:
            return _Views(sample.key, label, self.transform.center_view(image)[None])
        numbers = np.arange(self.format.views)
        uniforms = hash_uniform(self.seed, Stream.CROP, np.full_like(numbers, sample_id), numbers, 3)
        return _Views(sample.key, label, torch.stack([self.transform.random_view(image, row) for row in uniforms]))

    @torch.inference_mode()
    def _codes(self, crops: Tensor) -> np.ndarray:
        """(N, 3, S, S) -> (N, L) int64. Raises ValueError if these are not codes of this vocabulary."""
        codes = torch.cat([self.encode(part).cpu() for part in crops.split(self.batch_size)]).numpy()
        expected = (len(crops), self.format.num_tokens)
        if codes.shape != expected:
            raise ValueError(f"the tokenizer gave codes of shape {codes.shape}, expected {expected}; see patch_nums")
        if codes.min() < 0 or codes.max() >= self.vocab_size:
            raise ValueError(f"the tokenizer gave codes {codes.min()} .. {codes.max()}, vocab_size {self.vocab_size}")
        return codes
