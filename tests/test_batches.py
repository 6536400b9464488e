"""Batches that are read together have errors and bad samples of their own, as if each were read by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from read_batches import assert_same, flip_a_sample, joined
from tiny import open_codes, pack_codes

from data_pipeline.batches import Batch
from data_pipeline.damage import DamagedData
from data_pipeline.loader import train_batches


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


def test_batches_move_to_a_device(tmp_path: Path) -> None:
    codes = open_codes(pack_codes(tmp_path))
    batch = next(train_batches(codes, batch_size=2, rank=0, world_size=1, samples_seen=0, seed=0))
    moved = batch.to("meta")
    assert all(getattr(moved, name).is_meta for name in ("data", "labels", "positions", "weights"))
