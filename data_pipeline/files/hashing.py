"""Random numbers as hashes (splitmix64) of what they belong to, never the state of a generator.

So they do not depend on the order in which they are drawn, on ranks or workers, or on the version of a library.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import cast

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIXING = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """Hash each combination of non-negative keys, which broadcast, to 64 well-mixed bits. -> uint64, one axis or more.

    Numbers alone give the same read-only array every time.
    """
    leading = next((place for place, key in enumerate(keys) if isinstance(key, np.ndarray)), len(keys))
    return _mixed(_hash_numbers(*cast(tuple[int, ...], keys[:leading])), keys[leading:])


@lru_cache
def _hash_numbers(*keys: int) -> np.ndarray:
    """Hash the keys that come first and are the same for all samples, once instead of for every sample."""
    bits = _mixed(np.zeros(1, dtype=np.uint64), keys)
    bits.setflags(write=False)
    return bits


def _mixed(state: np.ndarray, keys: Iterable[int | np.ndarray]) -> np.ndarray:
    for key in keys:
        state = _splitmix64(state ^ np.asarray(key).astype(np.uint64))
    return state


def _splitmix64(state: np.ndarray) -> np.ndarray:
    # Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), with Vigna's constants. Modulo 2^64.
    state = state + GOLDEN_GAMMA
    for shift, factor in MIXING:
        state ^= state >> shift
        state *= factor
    state ^= state >> LAST_SHIFT
    return state


def hash_uniform(seed: int, stream: int, ids: np.ndarray, epochs: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` numbers in [0, 1) for each (sample, epoch). ids, epochs: (B,) int64 -> (B, count) float64."""
    bits = hash_keys(seed, stream, ids[:, None], epochs[:, None], np.arange(count))
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(length: int, *keys: int) -> np.ndarray:
    """Draw a permutation of 0 .. length - 1 that depends on the keys alone. -> (length,) int64."""
    return np.argsort(hash_keys(*keys, np.arange(length)), kind="stable")
