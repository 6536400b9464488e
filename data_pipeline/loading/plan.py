"""The order of samples as a pure function of (seed, position).

The training stream is endless. Stream position g is sample g mod N of epoch g // N, N being the number of samples, so
each sample comes exactly once per epoch and one integer is the whole state. An epoch is shuffled in two levels: first
the order of the shards, then the samples inside long windows of that line. All randomness is a hash of what it belongs
to (data_pipeline/files/hashing.py), so it does not depend on ranks, workers, or the version of a library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from data_pipeline.files.hashing import permutation

WINDOW_SAMPLES = 2**20


class Stream(IntEnum):
    """The uses of random numbers; different streams are independent. The values are part of the order of old runs."""

    SHARDS = 1
    WINDOW = 2
    CROP = 3
    VIEW = 4
    SPLIT = 5
    PACKING = 6
    SHEET = 7


class Need(NamedTuple):
    """A shard, and the stream position of the first sample that needs it."""

    position: int
    shard: int


class Plan:
    """Which sample stands at each position of the endless training stream."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int = WINDOW_SAMPLES) -> None:
        """Plan the order of `shard_sizes` samples in each shard, zero allowed, `window` samples shuffled together.

        Raises ValueError without samples, for a negative seed, and for a window below 1.
        """
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
        """Return sample ids and epochs at stream positions start .. stop - 1. -> two (stop - start,) int64."""
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
        """Yield without end the shards that each window needs, in the order of need, from a stream position on.

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
        """Shuffle the ids in window `number` of the line of shards of this epoch. -> (samples in the window,) int64."""
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
