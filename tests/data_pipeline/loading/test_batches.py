"""Batches that are read together have errors and bad samples of their own, as if each were read by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from read_batches import assert_same, flip_a_sample, joined
from shard_server import shard_server
from tiny import open_codes, pack_codes

from data_pipeline.files.damage import DamagedData
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset
from data_pipeline.loading.loader import train_batches
from data_pipeline.remote.cache import CacheConfig
from data_pipeline.shards.index import Storage


def take_until_damage(batches: Iterator[Batch]) -> tuple[list[Batch], str]:
    taken = []
    with pytest.raises(DamagedData) as caught:
        for batch in batches:
            taken.append(batch)
    return taken, str(caught.value)


def test_batches_that_are_read_together_have_their_own_errors(tmp_path: Path) -> None:
    """Those before the damage arrive, and it is told as it is of a batch that is read by itself."""
    flip_a_sample(pack_codes(tmp_path / "codes") / "shard-000001.tar")
    share = {"batch_size": 2, "rank": 0, "world_size": 1, "samples_seen": 0, "seed": 5}
    expected, reason = take_until_damage(train_batches(open_codes(tmp_path / "codes"), workers=1, **share))
    taken, told = take_until_damage(train_batches(open_codes(tmp_path / "codes"), **share))
    assert told == reason and len(taken) == len(expected) > 0
    assert_same(joined(taken), joined(expected))


def test_batches_that_are_read_together_have_their_own_bad_samples(tmp_path: Path) -> None:
    flip_a_sample(pack_codes(tmp_path / "codes") / "shard-000001.tar")
    share = {"batch_size": 2, "rank": 0, "world_size": 1, "samples_seen": 0, "seed": 5}
    alone, together = (train_batches(open_codes(tmp_path / "codes", max_bad=9), workers=n, **share) for n in (1, 0))
    found = [(next(alone), next(together)) for _ in range(30)]
    assert [batch.bad for batch, _ in found] == [batch.bad for _, batch in found]
    assert sum(len(batch.bad) for batch, _ in found) >= 2  # one in each epoch of 21 samples


def test_only_batches_with_bad_samples_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_a_sample(pack_codes(tmp_path / "codes") / "shard-000001.tar")
    requested: list[int] = []
    read = CodeDataset.read_or_substitute

    def counted(dataset: CodeDataset, ids: np.ndarray, epochs: np.ndarray) -> Any:
        requested.append(len(ids))
        return read(dataset, ids, epochs)

    monkeypatch.setattr(CodeDataset, "read_or_substitute", counted)
    monkeypatch.setattr(CodeDataset, "read_together", 20)
    codes = open_codes(tmp_path / "codes", max_bad=9)
    batches = train_batches(codes, batch_size=2, rank=0, world_size=1, samples_seen=0, seed=5)
    found = [next(batches) for _ in range(11)]  # the last of them is of the second reading
    batches.close()
    assert sum(len(batch.bad) for batch in found[:10]) == 1 and requested[:3] == [20, 2, 20]


def test_remote_shards_are_not_asked_for_together(tmp_path: Path) -> None:
    """Of 15 shards four batches of two samples, which the thread may have ahead, need eight at most."""
    files = {path.name: path.read_bytes() for path in pack_codes(tmp_path / "codes", 60).iterdir()}
    share = {"batch_size": 2, "rank": 0, "world_size": 1, "samples_seen": 0, "seed": 5}
    expected = list(islice(train_batches(open_codes(tmp_path / "codes"), **share), 30))
    with shard_server(**files) as server:
        storage = Storage(server.url(""), CacheConfig(folder=str(tmp_path / "cache"), ahead=1))
        codes = open_codes(storage)
        batches = train_batches(codes, **share)
        assert_same(next(batches), expected[0])
        time.sleep(0.5)  # as long as it may take to fetch the others
        assert 1 <= sum(shard.sha256 in os.listdir(tmp_path / "cache") for shard in codes.index.shards) <= 8 + 1
        assert_same(joined(islice(batches, 29)), joined(expected[1:]))
        batches.close()


def test_batches_move_to_a_device(tmp_path: Path) -> None:
    codes = open_codes(pack_codes(tmp_path))
    batch = next(train_batches(codes, batch_size=2, rank=0, world_size=1, samples_seen=0, seed=0))
    moved = batch.to("meta")
    assert all(getattr(moved, name).is_meta for name in ("data", "labels", "positions", "weights"))
