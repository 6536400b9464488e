"""Hashes as random numbers: even, independent for different keys, and the published function."""

from __future__ import annotations

import numpy as np

from data_pipeline.files.hashing import hash_keys, hash_uniform, permutation


def test_permutations_of_three_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        order = tuple(int(i) for i in permutation(3, 0, key))
        counts[order] = counts.get(order, 0) + 1
    # 1,000 of each expected; the standard deviation is 29, so 150 is five of them.
    assert len(counts) == 6 and all(abs(number - 1000) < 150 for number in counts.values())


def test_hash_uniform_is_uniform_and_depends_on_every_key() -> None:
    ids, epochs = np.arange(20_000), np.zeros(20_000, dtype=np.int64)
    uniforms = hash_uniform(0, 3, ids, epochs, 3)
    assert uniforms.shape == (20_000, 3) and uniforms.min() >= 0.0 and uniforms.max() < 1.0
    # Mean 1/2 and variance 1/12; the means of 20,000 have standard deviation 0.002, the correlations 0.007.
    np.testing.assert_allclose(uniforms.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(uniforms.var(0), 1 / 12, atol=0.005)
    others = [hash_uniform(1, 3, ids, epochs, 1), hash_uniform(0, 4, ids, epochs, 1)]
    others += [hash_uniform(0, 3, ids, epochs + 1, 1), uniforms[:, 1:2], np.roll(uniforms[:, :1], 1)]
    for other in others:
        assert abs(np.corrcoef(uniforms[:, 0], other[:, 0])[0, 1]) < 0.035


def test_hash_is_the_published_splitmix64() -> None:
    # The first output of splitmix64 for seed 0 is 0xE220A8397B1DCDAF (Vigna's reference program).
    assert int(hash_keys(0)[0]) == 0xE220A8397B1DCDAF
