"""The order of samples is a pure function: complete in every epoch, different in each, the same however it is read."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.loading.plan import Plan, Stream, hash_keys, hash_uniform, permutation

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


def test_a_narrow_window_still_shuffles_the_shards() -> None:
    ids, _ = Plan((10,) * 20, seed=0, window=10).samples(0, 200)
    shards = ids.reshape(20, 10) // 10
    assert (shards == shards[:, :1]).all() and list(shards[:, 0]) != list(range(20))


def test_permutations_of_three_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        order = tuple(int(i) for i in permutation(3, 0, key))
        counts[order] = counts.get(order, 0) + 1
    # 1,000 of each expected; the standard deviation is 29, so 150 is five of them.
    assert len(counts) == 6 and all(abs(number - 1000) < 150 for number in counts.values())


def test_hash_uniform_is_uniform_and_depends_on_every_key() -> None:
    ids, epochs = np.arange(20_000), np.zeros(20_000, dtype=np.int64)
    uniforms = hash_uniform(0, Stream.CROP, ids, epochs, 3)
    assert uniforms.shape == (20_000, 3) and uniforms.min() >= 0.0 and uniforms.max() < 1.0
    # Mean 1/2 and variance 1/12; the means of 20,000 have standard deviation 0.002, the correlations 0.007.
    np.testing.assert_allclose(uniforms.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(uniforms.var(0), 1 / 12, atol=0.005)
    others = [hash_uniform(1, Stream.CROP, ids, epochs, 1), hash_uniform(0, Stream.VIEW, ids, epochs, 1)]
    others += [hash_uniform(0, Stream.CROP, ids, epochs + 1, 1), uniforms[:, 1:2], np.roll(uniforms[:, :1], 1)]
    for other in others:
        assert abs(np.corrcoef(uniforms[:, 0], other[:, 0])[0, 1]) < 0.035


def test_hash_is_the_published_splitmix64() -> None:
    # The first output of splitmix64 for seed 0 is 0xE220A8397B1DCDAF (Vigna's reference program).
    assert int(hash_keys(0)[0]) == 0xE220A8397B1DCDAF


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
