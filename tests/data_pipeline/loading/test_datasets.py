"""Bad samples are errors, or replaced: by the same neighbour whoever reads them, noted, and never above the limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from read_batches import flip_a_sample
from shard_mutations import make_images
from tiny import open_codes, pack_codes

from data_pipeline.files.damage import DamagedData, DamagedShard
from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.datasets import ImageDataset, bad_sample_limit
from data_pipeline.loading.loader import train_batches, validation_batches
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import Sample
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import write_shards

TRANSFORM = ImageTransform(image_size=8, resize_ratio=1.0)
BAD = {2, 3, 9}


def pack_with_bad_images(folder: Path, count: int = 12) -> Path:
    """Samples 2, 3 and 9 cannot be decoded; shards of five."""
    samples = make_images(count)
    for number in BAD:
        samples[number] = Sample(samples[number].key, {"cls": b"1", "jpg": b"not a picture"})
    write_shards(samples, folder, kind="images", meta={"classes": ["cat", "dog"]}, samples_per_shard=5)
    return folder


def open_images(folder: Path, max_bad: int = 0) -> ImageDataset:
    return ImageDataset(folder, TRANSFORM, seed=0, random_views=True, max_bad=max_bad)


def test_a_bad_sample_is_an_error_that_names_it(tmp_path: Path) -> None:
    dataset = open_images(pack_with_bad_images(tmp_path))
    with pytest.raises(DamagedData, match="shard-000000.tar: sample 000000002: not a JPEG"):
        dataset.read_or_substitute(np.arange(5), np.zeros(5, np.int64))


def test_the_next_good_sample_of_the_shard_stands_in(tmp_path: Path) -> None:
    dataset = open_images(pack_with_bad_images(tmp_path), max_bad=9)
    ids, epochs = np.arange(12), np.full(12, 3)
    images, labels, bad = dataset.read_or_substitute(ids, epochs)
    assert [(one.sample, one.substitute) for one in bad] == [(2, 4), (3, 4), (9, 5)]  # 9 is the last of its shard
    good = np.array([0, 1, 4, 4, 4, 5, 6, 7, 8, 5, 10, 11])
    expected, expected_labels = dataset.read_narrow(good, epochs)
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("world_size, workers", [(2, 0), (3, 0), (1, 2)])
def test_substitutes_are_the_same_at_any_number_of_ranks_and_workers(
    tmp_path: Path, world_size: int, workers: int
) -> None:
    folder = pack_with_bad_images(tmp_path)

    def stream(world_size: int, workers: int) -> tuple[torch.Tensor, set[tuple[int, int]]]:
        datasets = [open_images(folder, max_bad=9) for _ in range(world_size)]
        options = {"batch_size": 12 // world_size, "world_size": world_size, "samples_seen": 0, "seed": 1}
        parts = [train_batches(data, rank=rank, workers=workers, **options) for rank, data in enumerate(datasets)]
        rows = [next(batches).data for _ in range(2) for batches in parts]
        return torch.cat(rows), {(bad.sample, bad.substitute) for data in datasets for bad in data.take_bad()}

    images, bad = stream(1, 0)
    other_images, other_bad = stream(world_size, workers)
    assert torch.equal(images, other_images) and bad == other_bad == {(2, 4), (3, 4), (9, 5)}


def test_samples_are_noted_when_they_are_shown_and_once_taken_forgotten(tmp_path: Path) -> None:
    dataset = open_images(pack_with_bad_images(tmp_path), max_bad=9)
    batches = validation_batches(dataset, batch_size=4, rank=0, world_size=1)
    assert dataset.take_bad() == []
    next(batches)
    assert [bad.sample for bad in dataset.take_bad()] == [2, 3] and dataset.take_bad() == []


def test_a_shard_without_a_good_sample_is_an_error(tmp_path: Path) -> None:
    samples = [Sample(f"{number}", {"cls": b"0", "jpg": b"no"}) for number in range(3)]
    write_shards(samples, tmp_path, kind="images", meta={"classes": ["cat"]}, samples_per_shard=9)
    with pytest.raises(DamagedData, match="nor is there a good sample to put in its place"):
        open_images(tmp_path, max_bad=9).read_or_substitute(np.arange(1), np.zeros(1, np.int64))


def test_a_shard_of_which_nothing_can_be_read_is_an_error_at_once(tmp_path: Path) -> None:
    folder = pack_with_bad_images(tmp_path)
    (folder / "shard-000000.members").write_bytes(bytes(33 * 10))
    with pytest.raises(DamagedShard, match="shard-000000.members: damaged, its sha256"):
        open_images(folder, max_bad=9).read_or_substitute(np.arange(1), np.zeros(1, np.int64))


def test_damaged_codes_are_replaced_too(tmp_path: Path) -> None:
    pack_codes(tmp_path)
    strict = open_codes(tmp_path)
    flip_a_sample(tmp_path / "shard-000000.tar")
    ids, epochs = np.arange(3), np.zeros(3, np.int64)
    with pytest.raises(DamagedData, match="shard-000000.tar: damaged shard, member vq12 of sample 1"):
        strict.read(ids, epochs)
    strict.max_bad = 1
    codes, _, bad = strict.read_or_substitute(ids, epochs)
    assert [one.sample for one in bad] == [1]
    assert torch.equal(codes, strict.read(np.array([0, 2, 2]), epochs)[0])


def test_a_label_beyond_the_classes_is_named(tmp_path: Path) -> None:
    index = write_shards(make_images(3), tmp_path, kind="images", meta={"classes": ["cat", "dog"]}, samples_per_shard=9)
    replace(index, meta={"classes": ["cat"]}).write(tmp_path)
    with pytest.raises(DamagedData, match="sample 1 has a label that is not one of the 1 classes"):
        open_images(tmp_path).read(np.arange(3), np.zeros(3, np.int64))
    assert len(ShardReader(tmp_path, Index.read(tmp_path))) == 3


def test_the_policy_is_strict_or_a_limit() -> None:
    assert bad_sample_limit("strict") == 0 and bad_sample_limit("quarantine:25") == 25
    for wrong in ("quarantine", "quarantine:0", "quarantine:-1", "quarantine:1e9", "skip", ""):
        with pytest.raises(ValueError, match="accepted: strict, or quarantine:MAX"):
            bad_sample_limit(wrong)
