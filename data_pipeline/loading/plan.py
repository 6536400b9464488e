"""The order of samples as a pure function of (seed, position).

The training stream is endless. Stream position g is sample g mod N of epoch g // N, N being the number of samples, so
each sample comes exactly once per epoch and one integer is the whole state. An epoch is shuffled in two levels: the
order of the shards, then the samples inside long windows of that line. All randomness is a hash (splitmix64) of what
it belongs to, never the state of a generator, so it does not depend on ranks, workers, or the version of a library.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

WINDOW_SAMPLES = 2**20
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIXING = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)


class Stream(IntEnum):
    """What random numbers are for. Different streams are independent. The values are part of the order: keep them."""

    SHARDS = 1
    WINDOW = 2
    CROP = 3
    VIEW = 4
    SPLIT = 5
    PACKING = 6
    SHEET = 7


def hash_keys(*keys: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each combination of non-negative keys, which broadcast. -> uint64, at least one axis.

    Of numbers alone it is the same read-only array every time.
    """
    leading = next((place for place, key in enumerate(keys) if isinstance(key, np.ndarray)), len(keys))
    return _mixed(_hash_numbers(*keys[:leading]), keys[leading:])


@lru_cache
def _hash_numbers(*keys: int) -> np.ndarray:
    """The keys that are the same for all samples come first and stay the same: they are not mixed again every time."""
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


def hash_uniform(seed: int, stream: Stream, ids: np.ndarray, epochs: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each (sample, epoch). ids, epochs: (B,) int64 -> (B, count) float64."""
    bits = hash_keys(seed, stream, ids[:, None], epochs[:, None], np.arange(count))
    return (bits >> np.uint64(11)) * 2.0**-53


def permutation(length: int, *keys: int) -> np.ndarray:
    """A permutation of 0 .. length - 1 that depends on the keys alone. -> (length,) int64."""
    return np.argsort(hash_keys(*keys, np.arange(length)), kind="stable")


class Need(NamedTuple):
    """A shard, and the stream position of the first sample that needs it."""

    position: int
    shard: int


class Plan:
    """Which sample stands at each position of the endless training stream."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int = WINDOW_SAMPLES) -> None:
        """shard_sizes: samples in each shard, zero allowed; window: how many samples are shuffled together."""
        if sum(shard_sizes) < 1:
            raise ValueError(f"{len(shard_sizes)} shards hold no samples, expected at least one; pack the data again")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected 0 or more")
        if window < 1:
            raise ValueError(f"window is {window}, expected at least 1 sample")
        self.shard_sizes = tuple(shard_sizes)
        self.seed = seed
        self.window = window
        self.num_samples = sum(shard_sizes)
        self._recent: dict[tuple[int, int], np.ndarray] = {}  # (epoch, window number) -> its sample ids

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs at stream positions start .. stop - 1. -> two (stop - start,) int64."""
        assert 0 <= start <= stop, f"stream positions {start} .. {stop}"
        ids = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            epoch, within_epoch = divmod(position, self.num_samples)
            number, within_window = divmod(within_epoch, self.window)
            part = self._window_ids(epoch, number)[within_window : within_window + stop - position]
            ids[position - start : position - start + len(part)] = part
            position += len(part)
        return ids, np.arange(start, stop) // self.num_samples

    def shards_from(self, position: int) -> Iterator[Need]:
        """The shards that each window needs, in the order of need, from a stream position on without end.

        A shard comes once for every window that it has samples in.
        """
        ends = np.cumsum(self.shard_sizes)
        while True:
            epoch, within_epoch = divmod(position, self.num_samples)
            number, within_window = divmod(within_epoch, self.window)
            ids = self._window_ids(epoch, number)[within_window:]
            shards, first = np.unique(np.searchsorted(ends, ids, side="right"), return_index=True)
            for index in np.argsort(first):
                yield Need(position + int(first[index]), int(shards[index]))
            position += len(ids)

    def _window_ids(self, epoch: int, number: int) -> np.ndarray:
        key = (epoch, number)
        if key not in self._recent:
            # A batch touches at most the end of one window and the start of the next, unless windows are tiny.
            self._recent = dict(list(self._recent.items())[-1:])
            self._recent[key] = self._shuffled_window(epoch, number)
        return self._recent[key]

    def _shuffled_window(self, epoch: int, number: int) -> np.ndarray:
        """The ids in window `number` of the line of shards of this epoch, shuffled."""
        sizes = np.array(self.shard_sizes, dtype=np.int64)
        order = permutation(len(sizes), self.seed, Stream.SHARDS, epoch)
        ends = np.cumsum(sizes[order])  # in the line of shuffled shards
        low = number * self.window
        length = min(self.window, self.num_samples - low)
        line = low + permutation(length, self.seed, Stream.WINDOW, epoch, number)
        slots = np.searchsorted(ends, line, side="right")
        first_ids = np.cumsum(sizes) - sizes
        shards = order[slots]
        return first_ids[shards] + line - (ends - sizes[order])[slots]
