"""Batches: the same stream for any number of ranks and workers, resumed from one integer, nothing lost or repeated."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from read_batches import assert_same, flip_a_sample, joined
from tiny import VIEWS, open_codes, pack_codes

from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset, ImageDataset
from data_pipeline.loading.loader import first_of_classes, names_of_step, train_batches, validation_batches
from data_pipeline.shards.writer import Sample, write_shards

GLOBAL_BATCH = 8


def pack_grey_images(folder: Path, num_samples: int = 5) -> Path:
    samples = []
    for i in range(num_samples):
        buffer = io.BytesIO()
        ramp = (np.arange(36).reshape(6, 6, 1) + 40 * i).repeat(3, axis=2).astype(np.uint8)
        Image.fromarray(ramp).save(buffer, format="PNG")
        samples.append(Sample(f"{i:09d}", {"cls": str(i % 3).encode(), "png": buffer.getvalue()}))
    write_shards(samples, folder, kind="images", meta={"classes": list("abc")}, samples_per_shard=2)
    return folder


def global_stream(
    dataset: CodeDataset | ImageDataset,
    *,
    num_steps: int,
    samples_seen: int = 0,
    world_size: int = 1,
    workers: int = 0,
    global_batch: int = GLOBAL_BATCH,
) -> Batch:
    """What all ranks together read in `num_steps`, in the order of the stream."""
    share = {"batch_size": global_batch // world_size, "world_size": world_size}
    state = {"samples_seen": samples_seen, "seed": 5}
    ranks = [train_batches(dataset, rank=rank, workers=workers, **share, **state) for rank in range(world_size)]
    return joined(next(batches) for _ in range(num_steps) for batches in ranks)


@pytest.fixture
def codes(tmp_path: Path) -> CodeDataset:
    return open_codes(pack_codes(tmp_path / "codes"))


@pytest.mark.parametrize("world_size, workers", [(1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 2)])
def test_ranks_and_workers_do_not_change_the_stream(codes: CodeDataset, world_size: int, workers: int) -> None:
    expected = global_stream(codes, num_steps=7)  # 56 samples: two epochs of 21 and some
    assert expected.positions.tolist() == list(range(56)) and (expected.weights == 1).all()
    assert_same(global_stream(codes, num_steps=7, world_size=world_size, workers=workers), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("samples_seen", [8, 16, 24, 40])  # an epoch ends at 21 and at 42
def test_resuming_equals_not_stopping(codes: CodeDataset, samples_seen: int, workers: int) -> None:
    whole = global_stream(codes, num_steps=8)
    before = global_stream(codes, num_steps=samples_seen // 8)
    share = {"samples_seen": samples_seen, "world_size": 2, "workers": workers}
    after = global_stream(codes, num_steps=8 - samples_seen // 8, **share)
    assert_same(joined([before, after]), whole)


def test_another_batch_size_continues_the_same_stream(codes: CodeDataset) -> None:
    whole = global_stream(codes, num_steps=8)
    parts = [global_stream(codes, num_steps=3), global_stream(codes, num_steps=2, samples_seen=24, global_batch=20)]
    assert_same(joined(parts), whole)


def test_a_billion_epochs_further_is_as_near(codes: CodeDataset) -> None:
    batch = global_stream(codes, num_steps=1, samples_seen=21 * 10**9)
    assert batch.positions.tolist() == list(range(21 * 10**9, 21 * 10**9 + 8))


def test_each_epoch_holds_each_sample_once_with_its_own_label_and_codes(codes: CodeDataset) -> None:
    stream = global_stream(codes, num_steps=21)  # 168 samples: 8 epochs
    ids = stream.data[:, 0]
    for epoch in ids.reshape(8, 21):
        assert sorted(epoch.tolist()) == list(range(21))
    assert (stream.labels == ids % 3).all() and (stream.data[:, 4] == 7).all()
    assert stream.data.dtype == torch.int16 and stream.data.shape == (168, 5)


def test_as_many_epochs_as_views_show_each_view_of_each_sample_once(codes: CodeDataset) -> None:
    ids = np.arange(21)
    views = np.stack([codes.read(ids, np.full(21, epoch))[0][:, 1].numpy() for epoch in range(2 * VIEWS)])
    for cycle in (views[:VIEWS], views[VIEWS:]):
        assert (np.sort(cycle, axis=0) == np.arange(VIEWS)[:, None]).all()
        assert len({tuple(order) for order in cycle.T}) > 1  # not all samples in the same order


def test_the_names_of_a_step_are_those_of_the_samples_that_each_rank_reads(codes: CodeDataset) -> None:
    """Two micro-batches a rank and step. A sample's first code is its number, and its key."""
    share = {"batch_size": 2, "world_size": 2, "seed": 5}
    for rank in range(2):
        batches = train_batches(codes, rank=rank, samples_seen=16, **share)
        ids = [int(code) for batch in (next(batches), next(batches)) for code in batch.data[:, 0]]
        names = names_of_step(codes, first=16, global_batch=8, rank=rank, **share)
        assert names == [f"shard-{number // 4:06d}.tar:{number:09d}" for number in ids]


@pytest.mark.parametrize("num_samples", [1, 7, 8, 21])
@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 4), (3, 2), (4, 16)])
def test_validation_counts_each_sample_once(tmp_path: Path, num_samples: int, world_size: int, batch_size: int) -> None:
    dataset = open_codes(pack_codes(tmp_path / "codes", num_samples))
    ranks = [
        list(validation_batches(dataset, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    everything = joined(batch for batches in ranks for batch in batches)
    assert len(everything.labels) == world_size * batch_size * len(ranks[0])
    counted = everything.data[everything.weights == 1, 0]
    assert sorted(counted.tolist()) == list(range(num_samples)) and everything.weights.sum() == num_samples


def test_images_change_with_the_epoch_and_not_with_the_workers(tmp_path: Path) -> None:
    folder = pack_grey_images(tmp_path / "images")
    dataset = ImageDataset(folder, ImageTransform(4, 1.5), seed=0, random_views=True)
    first = global_stream(dataset, num_steps=5)
    assert first.data.shape == (40, 3, 4, 4) and first.data.dtype == torch.uint8
    assert_same(global_stream(dataset, num_steps=5, workers=2), first)
    ids = np.arange(5)
    epochs = [dataset.read(ids, np.full(5, epoch))[0] for epoch in range(8)]
    assert len({images.numpy().tobytes() for images in epochs}) == 8


def test_without_random_views_images_are_centre_crops(tmp_path: Path) -> None:
    dataset = ImageDataset(pack_grey_images(tmp_path / "images"), ImageTransform(4, 1.5), seed=0, random_views=False)
    images, labels = dataset.read(np.array([2]), np.array([9]))
    expected = (np.arange(36).reshape(6, 6)[1:5, 1:5] + 80) / 255 * 2 - 1
    np.testing.assert_allclose(images[0, 0], expected, atol=1e-6)
    assert labels.tolist() == [2] and dataset.num_classes == 3 and dataset.shard_sizes == (2, 2, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_found_while_reading_is_one_line_also_from_a_worker(tmp_path: Path, workers: int) -> None:
    flip_a_sample(pack_codes(tmp_path / "codes", num_samples=4) / "shard-000000.tar")
    with pytest.raises(ValueError, match="shard-000000.tar: damaged shard") as caught:
        global_stream(open_codes(tmp_path / "codes"), num_steps=1, workers=workers)
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    dataset = open_codes(pack_codes(tmp_path / "codes", label=lambda i: 3 if i == 2 else 0))
    with pytest.raises(ValueError, match="shard-000000.tar: sample 2 has a label .* 3 classes"):
        dataset.read(np.arange(4), np.zeros(4, dtype=np.int64))


def test_codes_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    dataset = open_codes(pack_codes(tmp_path / "codes", num_samples=65))  # a sample's first code is its number
    assert dataset.read(np.array([63]), np.zeros(1, dtype=np.int64))[0][0, 0] == 63
    with pytest.raises(ValueError, match="sample 64 has code 64, vocab_size is 64; re-run launchers/encode_codes.py"):
        dataset.read(np.array([0, 64]), np.zeros(2, dtype=np.int64))


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"rank": 2}, {"rank": -1}, {"samples_seen": -1}, {"workers": -1}, {"seed": -1}]
)
def test_impossible_shares_are_refused_at_once(codes: CodeDataset, change: dict) -> None:
    options = {"batch_size": 2, "rank": 0, "world_size": 2, "samples_seen": 0, "seed": 0, "workers": 0}
    with pytest.raises(ValueError, match="expected"):
        train_batches(codes, **{**options, **change})


def test_on_its_device_a_batch_is_what_models_take(tmp_path: Path, codes: CodeDataset) -> None:
    images = ImageDataset(pack_grey_images(tmp_path / "images"), ImageTransform(4, 1.5), seed=0, random_views=False)
    for dataset, dtype in ((codes, torch.int64), (images, torch.float32)):
        batch = next(validation_batches(dataset, batch_size=5, rank=0, world_size=1)).to("cpu")
        expected, labels = dataset.read(np.arange(5), np.zeros(5, np.int64))
        assert batch.data.dtype == dtype and batch.data.is_contiguous()
        assert torch.equal(batch.data, expected) and torch.equal(batch.labels, labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_a_gpu_are_pinned_ahead_in_a_thread(
    codes: CodeDataset, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what would pin says which thread it was called in, and for which device."""
    pinned: list[threading.Thread] = []
    used: list[torch.device] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(threading.current_thread()) or self)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    options = {"batch_size": 4, "rank": 0, "world_size": 1, "samples_seen": 0, "seed": 5, "workers": workers}
    batches = train_batches(codes, device="cuda:1", **options)
    plain = train_batches(codes, **options)
    for _ in range(3):
        assert_same(next(batches), next(plain))
    batches.close()
    assert len(pinned) >= 3 * 4 and threading.main_thread() not in pinned and used == [torch.device("cuda:1")]
    assert list(batches) == []


def test_reading_ahead_in_a_thread_leaves_the_data_set_to_others(codes: CodeDataset) -> None:
    batches = train_batches(codes, batch_size=4, rank=0, world_size=1, samples_seen=0, seed=5)
    next(batches)
    codes.reader.close()
    assert codes.read(np.arange(3), np.zeros(3, np.int64))[0][:, 0].tolist() == [0, 1, 2]
    assert next(batches).positions.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_the_first_sample_of_each_class_is_found_in_the_order_asked_for(tmp_path: Path, kind: str) -> None:
    if kind == "codes":  # labels 0 0 1 1 2 2 0 0 ...
        dataset: CodeDataset | ImageDataset = open_codes(pack_codes(tmp_path, label=lambda i: i // 2 % 3))
    else:  # labels 0 1 2 0 1
        dataset = ImageDataset(pack_grey_images(tmp_path), ImageTransform(4), seed=0, random_views=False)
    ids = first_of_classes(dataset, [2, 0, 2])
    assert ids.tolist() == ([4, 0, 4] if kind == "codes" else [2, 0, 2])
    assert dataset.read(ids, np.zeros_like(ids))[1].tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match="has no sample of class 3, of 3 classes"):
        first_of_classes(dataset, [0, 3])
