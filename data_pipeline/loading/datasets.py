"""Datasets: packed images and packed codes as tensors, by sample number and epoch.

A sample that does not match the index, cannot be decoded, or holds what cannot be, is an error that names it. A dataset
may instead be allowed a number of bad samples: then the next good one of the same shard stands in, the same whichever
rank or worker reads it, and whoever takes the batch is told. Legend: B batch, L codes of one image, S image size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from math import gcd
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.files.damage import BadSample, DamagedData, DamagedShard
from data_pipeline.files.hashing import hash_keys, hash_uniform
from data_pipeline.images.decoding import JSON_KEY, ImageTransform, image_of, label_of
from data_pipeline.images.tensors import stack_pixels, widen
from data_pipeline.loading.plan import Stream
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import Index, Storage
from data_pipeline.shards.members import Sample
from data_pipeline.shards.reader import ShardReader

STRICT = "strict"
QUARANTINE = re.compile(r"quarantine:([1-9][0-9]{0,8})")
REMEDY = "pack this data again, or let data.bad_samples be quarantine:MAX"
LOW_BITS = np.uint64(2**32 - 1)
MAX_TRIES = 100  # substitutes tried for one bad sample; where as many neighbours are bad, the shard is

Parsed = TypeVar("Parsed")


def bad_sample_limit(policy: str) -> int:
    """Return how many bad samples "strict" (none) or "quarantine:MAX" allows. Raises ValueError for anything else."""
    match = QUARANTINE.fullmatch(policy)
    if policy != STRICT and match is None:
        raise ValueError(f"bad_samples is {policy!r}; accepted: {STRICT}, or quarantine:MAX with MAX from 1")
    return int(match[1]) if match else 0


class PackedDataset:
    """What images and codes share: an index and its shards, labels that must be classes, and a limit of bad samples."""

    read_together = 1  # samples worth reading by one call: with more, a call costs no less for each

    def __init__(self, storage: Storage, index: Index, max_bad: int) -> None:
        """Open a packed folder. max_bad: 0 if a bad sample is an error, else how many of them the caller will bear.

        Raises ValueError if there are no samples, and what ShardReader raises.
        """
        if not index.num_samples:
            raise ValueError(f"{storage}: its {len(index.shards)} shards hold no samples; pack this data again")
        self.storage = storage
        self.folder = str(storage)
        self.index = index
        self.reader = ShardReader(storage, index)
        self.num_classes = len(index.meta["classes"])
        self.max_bad = max_bad
        self._bad: list[BadSample] = []

    def __len__(self) -> int:
        return self.index.num_samples

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """The number of samples in each shard."""
        return tuple(shard.samples for shard in self.index.shards)

    def read(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read samples as models take them. Raises DamagedData for one that is not as it was.

        ids, epochs: (B,) -> images (B, 3, S, S) float32 in [-1, 1] or codes (B, L) int64, and labels (B,) int64.
        """
        data, labels = self.read_narrow(ids, epochs)
        return widen(data), labels

    def read_narrow(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read samples as they are moved: images as uint8, codes as int16 or int32. Otherwise it is `read`."""
        raise NotImplementedError

    def label(self, sample_id: int) -> int:
        """Read the class of a sample, and no more of it than need be. Raises DamagedData."""
        raise NotImplementedError

    def read_or_substitute(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor, tuple[BadSample, ...]]:
        """Read as `read_narrow` does, replacing bad samples if they are allowed, and tell which were replaced."""
        try:
            return (*self.read_narrow(ids, epochs), ())
        except DamagedData:
            if not self.max_bad:
                raise
        bad: list[BadSample] = []
        rows = [self._row(int(sample_id), epoch, bad) for sample_id, epoch in zip(ids, epochs, strict=True)]
        data, labels = zip(*rows)
        return torch.cat(data), torch.cat(labels), tuple(bad)

    def twin(self) -> PackedDataset:
        """Return the same data for another thread, read through open files of its own."""
        other = copy(self)
        other.reader = self.reader.twin()
        return other

    def try_one(self) -> None:
        """Read the first sample, so that what suits no sample shows before anything starts. Raises DamagedData."""
        self.read_or_substitute(np.zeros(1, np.int64), np.zeros(1, np.int64))

    def note_bad(self, bad: tuple[BadSample, ...]) -> None:
        """Remember which samples of a batch were replaced, until somebody takes note."""
        self._bad.extend(bad)

    def take_bad(self) -> list[BadSample]:
        """Return the bad samples that were remembered since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def _row(self, sample_id: int, epoch: int, bad: list[BadSample]) -> tuple[Tensor, Tensor]:
        epochs = np.array([epoch])
        try:
            return self.read_narrow(np.array([sample_id]), epochs)
        except DamagedShard:
            raise
        except DamagedData as error:
            reason = str(error)
        shard = self.reader.neighbours(sample_id)
        for tried in range(1, min(len(shard), MAX_TRIES + 1)):
            other = shard[(sample_id - shard.start + tried) % len(shard)]
            try:
                row = self.read_narrow(np.array([other]), epochs)
            except DamagedData:
                continue
            bad.append(BadSample(self.reader.path_of(sample_id), sample_id, reason, other))
            return row
        raise DamagedData(f"{reason}; nor is there a good sample to put in its place; copy or pack this shard again")

    def _checked_labels(self, labels: Sequence[int] | np.ndarray, ids: np.ndarray) -> Tensor:
        labels = np.asarray(labels, dtype=np.int64)
        for sample_id in ids[labels >= self.num_classes]:
            raise DamagedData(
                f"{self.reader.path_of(sample_id)}: sample {sample_id} has a label that is not one of the"
                f" {self.num_classes} classes in the index; pack this data again"
            )
        return torch.from_numpy(labels)


class ImageDataset(PackedDataset):
    """Images of a packed folder: a fresh random view in every epoch, or always the centre view."""

    def __init__(
        self,
        folder: str | Path | Storage,
        transform: ImageTransform,
        *,
        seed: int,
        random_views: bool,
        max_bad: int = 0,
    ) -> None:
        """Open a folder of image shards. Raises FileNotFoundError or ValueError if it is not a complete one."""
        storage = Storage.of(folder)
        super().__init__(storage, Index.read(storage, kind="images"), max_bad)
        self.transform = transform
        self.seed = seed
        self.random_views = random_views
        self.json_label = self.index.meta.get("json_label", JSON_KEY)

    def read_narrow(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read and crop images. ids, epochs: (B,) -> images (B, 3, S, S) uint8, labels (B,) int64."""
        uniforms = hash_uniform(self.seed, Stream.CROP, ids, epochs, 3)
        labels: list[int] = []

        def views() -> Iterator[Image.Image]:  # one at a time, so that each finds the memory of the one before
            for sample_id, row in zip(ids, uniforms, strict=True):
                view, label = self._parsed(sample_id, partial(self._view_and_label, uniforms=row))
                labels.append(label)
                yield view

        pixels = stack_pixels(views(), number=len(ids), side=self.transform.image_size)
        return pixels, self._checked_labels(labels, ids)

    def label(self, sample_id: int) -> int:
        """Read the class of a sample, without decoding its image."""
        return self._parsed(sample_id, lambda sample: label_of(sample, self.json_label))

    def _view_and_label(self, sample: Sample, uniforms: np.ndarray) -> tuple[Image.Image, int]:
        image, label = image_of(sample), label_of(sample, self.json_label)
        if self.random_views:
            return self.transform.random_crop(image, uniforms), label
        return self.transform.center_crop(image), label

    def _parsed(self, sample_id: int, parse: Callable[[Sample], Parsed]) -> Parsed:
        """Read a sample and take something from it. Raises DamagedData naming the sample where `parse` fails."""
        sample = self.reader.read(sample_id)
        try:
            return parse(sample)
        except ValueError as error:
            raise DamagedData(f"{self.reader.path_of(sample_id)}: sample {sample.key}: {error}; {REMEDY}") from error


class CodeDataset(PackedDataset):
    """Codes of a packed folder. Of K stored views, K epochs show each sample each view once, in an order of its own."""

    read_together = 256

    def __init__(
        self,
        folder: str | Path | Storage,
        *,
        patch_nums: Sequence[int],
        vocab_size: int,
        tokenizer_sha256: str | None,
        max_bad: int = 0,
    ) -> None:
        """Open a folder of code shards. tokenizer_sha256 None: any tokenizer will do, as where nothing is decoded.

        Raises FileNotFoundError or ValueError if the folder is incomplete or its codes were made for something else.
        """
        storage = Storage.of(folder)
        super().__init__(storage, Index.read(storage, kind="codes"), max_bad)
        wanted = {"patch_nums": list(patch_nums), "vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
        for name, want in wanted.items():
            got = self.index.meta[name]
            if want is not None and got != want:
                raise ValueError(
                    f"{storage}: codes made with {name} {got}, this run uses {want};"
                    " re-run launchers/encode_codes.py or change the config"
                )
        self.vocab_size = vocab_size
        self.format = CodeFormat(self.index.meta["num_tokens"], self.index.meta["views"], self.index.meta["bits"])
        views = self.format.views
        self._strides = np.array([stride for stride in range(1, views + 1) if gcd(stride, views) == 1])

    def read_narrow(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[Tensor, Tensor]:
        """Read one view of each sample. ids, epochs: (B,) -> codes (B, L) int16, or int32 of 16 bits, labels (B,)."""
        ids = np.asarray(ids, dtype=np.int64)
        rows = self.reader.read_records(ids, self._views(ids, epochs), self.format.kind, otherwise=self._record)
        try:
            labels, codes = self.format.unpack(rows)
        except ValueError:
            self._name_malformed(rows, ids)
            raise
        if codes.max() >= self.vocab_size:
            worst = ids[codes.max(axis=1).argmax()]
            raise DamagedData(
                f"{self.reader.path_of(worst)}: sample {worst} has code {codes.max()}, vocab_size is {self.vocab_size};"
                " re-run launchers/encode_codes.py"
            )
        return torch.from_numpy(codes), self._checked_labels(labels, ids)

    def label(self, sample_id: int) -> int:
        """Read the class of a sample."""
        rows = self.reader.read_records(np.array([sample_id]), np.array([0]), self.format.kind, otherwise=self._record)
        return int(self.format.unpack(rows)[0][0])

    def _record(self, sample_id: int) -> bytes:
        sample = self.reader.read(sample_id)
        record = sample.members.get(self.format.suffix)
        if record is None or len(record) != self.format.record_bytes:
            raise DamagedData(
                f"{self.reader.path_of(sample_id)}: sample {sample.key} has no {self.format.suffix} member of"
                f" {self.format.record_bytes} bytes; re-run launchers/encode_codes.py"
            )
        return record

    def _name_malformed(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Raise DamagedData for the first record that cannot be unpacked."""
        for row, sample_id in zip(rows, ids, strict=True):
            try:
                self.format.unpack(row[None])
            except ValueError as error:
                raise DamagedData(f"{self.reader.path_of(sample_id)}: sample {sample_id}: {error}") from error

    def _views(self, ids: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Choose the view that each sample shows in its epoch, so that K epochs show each of K views once. -> (B,)

        In K epochs a sample goes on from view to view by a stride that has no divisor in common with K. First view and
        stride are drawn anew for each sample and every K epochs.
        """
        views, strides = self.format.views, self._strides
        if views == 1:
            return np.zeros(len(ids), dtype=np.int64)
        cycles, turns = np.divmod(epochs, views)
        bits = hash_keys(0, Stream.VIEW, ids, cycles)  # (B,)
        first, chosen = (bits >> np.uint64(32)) % np.uint64(views), (bits & LOW_BITS) % np.uint64(len(strides))
        return (first.astype(np.int64) + turns * strides[chosen]) % views
