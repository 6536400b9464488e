"""The order of samples is a pure function: complete in every epoch, different in each, the same however it is read."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.loading.plan import Plan, Stream

UNEVEN_SHARDS = (5, 0, 1, 17, 0, 8)  # 31 samples


@pytest.mark.parametrize("shard_sizes", [(31,), UNEVEN_SHARDS, (1,)])
@pytest.mark.parametrize("window", [1, 4, 31, 2**20])
def test_each_epoch_holds_each_sample_exactly_once(shard_sizes: tuple[int, ...], window: int) -> None:
    plan = Plan(shard_sizes, seed=3, window=window)
    for epoch in range(3):
        ids, epochs = plan.samples(epoch * plan.num_samples, (epoch + 1) * plan.num_samples)
        assert sorted(ids) == list(range(plan.num_samples))
        assert (epochs == epoch).all()


@pytest.mark.parametrize("chunk", [1, 7, 31, 50])
def test_order_does_not_depend_on_how_the_stream_is_cut(chunk: int) -> None:
    whole, whole_epochs = Plan(UNEVEN_SHARDS, seed=3, window=4).samples(0, 100)
    plan = Plan(UNEVEN_SHARDS, seed=3, window=4)
    parts = [plan.samples(start, min(start + chunk, 100)) for start in range(0, 100, chunk)]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), whole)
    np.testing.assert_array_equal(np.concatenate([epochs for _, epochs in parts]), whole_epochs)


def test_a_position_far_ahead_is_reached_without_reading_the_way_there() -> None:
    start = 10**15
    plan, other = Plan(UNEVEN_SHARDS, seed=3), Plan(UNEVEN_SHARDS, seed=3)
    other.samples(0, 40)
    np.testing.assert_array_equal(plan.samples(start, start + 40)[0], other.samples(start, start + 40)[0])
    assert plan.samples(start, start + 1)[1] == start // 31


def test_epochs_and_seeds_give_different_orders() -> None:
    first, second = (Plan((500, 500), seed=0).samples(start, start + 1000)[0] for start in (0, 1000))
    other_seed = Plan((500, 500), seed=1).samples(0, 1000)[0]
    assert (first != second).mean() > 0.9 and (first != other_seed).mean() > 0.9


def test_a_wide_window_mixes_samples_of_all_shards() -> None:
    ids, _ = Plan((100,) * 10, seed=0).samples(0, 100)
    assert len(set(ids // 100)) == 10


def test_the_shards_have_another_order_in_each_epoch() -> None:
    plan = Plan((10,) * 20, seed=0, window=10)  # a window is a shard
    orders = []
    for epoch in range(2):
        shards = plan.samples(200 * epoch, 200 * epoch + 200)[0].reshape(20, 10) // 10
        assert (shards == shards[:, :1]).all()
        orders.append(shards[:, 0].tolist())
    assert orders[0] != orders[1] and list(range(20)) not in orders


def test_the_windows_of_an_epoch_are_shuffled_differently() -> None:
    ids, _ = Plan((200,), seed=0, window=100).samples(0, 200)
    assert (ids[:100] % 100 != ids[100:] % 100).mean() > 0.9


def test_the_order_of_old_runs_stays() -> None:
    """A run that goes on with another order would see some samples twice in an epoch, and others never."""
    assert Plan((3, 0, 4, 2), seed=7, window=4).samples(0, 18)[0].tolist() == [
        *(7, 1, 2, 0, 5, 8, 4, 3, 6),
        *(1, 0, 2, 3, 7, 4, 5, 6, 8),
    ]
    numbers = {"SHARDS": 1, "WINDOW": 2, "CROP": 3, "VIEW": 4, "SPLIT": 5, "PACKING": 6, "SHEET": 7}
    assert {stream.name: stream.value for stream in Stream} == numbers


@pytest.mark.parametrize("shard_sizes, seed, window", [((), 0, 8), ((0, 0), 0, 8), ((4,), -1, 8), ((4,), 0, 0)])
def test_impossible_plans_are_refused(shard_sizes: tuple[int, ...], seed: int, window: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Plan(shard_sizes, seed=seed, window=window)


@pytest.mark.parametrize("position", [0, 5, 37, 60])
def test_shards_come_in_the_order_of_need(position: int) -> None:
    """Against the samples themselves: the first place of each shard in each window, from a position on."""
    plan = Plan((4, 0, 7, 5, 3, 6), seed=1, window=10)  # 25 samples; windows of 10, 10 and 5
    bounds = np.cumsum(plan.shard_sizes)
    expected, stop = [], 75
    while position < stop:
        epoch, within = divmod(position, 25)
        end = min(epoch * 25 + (within // 10 + 1) * 10, (epoch + 1) * 25)
        ids, _ = plan.samples(position, end)
        shards = np.searchsorted(bounds, ids, side="right").tolist()
        expected += [(position + place, shard) for place, shard in enumerate(shards) if shard not in shards[:place]]
        position = end
    needs = Plan((4, 0, 7, 5, 3, 6), seed=1, window=10).shards_from(expected[0][0])
    assert [tuple(next(needs)) for _ in expected] == expected
