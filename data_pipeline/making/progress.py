"""Say how far the making of shards has come: all workers together, as fast as they have been so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from data_pipeline.making.claims import Claims

EVERY_SECONDS = 5.0  # between two lines
Item = TypeVar("Item")


class Progress:
    """A count of images that now and then reports how many are done, how fast, and how long the rest will take."""

    def __init__(self, claims: Claims, sizes: Mapping[str, int], *, report: Callable[[str], None]) -> None:
        """Begin to measure now. sizes: the number of images of each shard."""
        self._claims = claims
        self._sizes = sizes
        self._report = report
        self._started = self._said = time.monotonic()
        self._images_before = self._images_committed()
        self._images = self._bytes = 0  # by this process

    def counted(self, items: Iterable[Item], num_bytes: Callable[[Item], int]) -> Iterator[Item]:
        """Pass on the images of one shard, one by one, and count them and their bytes."""
        for number, item in enumerate(items, 1):
            self._images += 1
            self._bytes += num_bytes(item)
            if time.monotonic() - self._said >= EVERY_SECONDS:
                self._report(self._line(number))
                self._said = time.monotonic()
            yield item

    def summary(self) -> str:
        """Say what this process has done, and how fast."""
        seconds = time.monotonic() - self._started
        return f"{self._images} images by this process in {_duration(seconds)}: {self._rate()}"

    def _line(self, images_in_shard: int) -> str:
        total, committed = sum(self._sizes.values()), self._images_committed()
        images = min(total, committed + images_in_shard)
        rate = max(images - self._images_before, 1) / self._seconds()
        done = f"{len(self._claims.done())} of {len(self._sizes)} shards done, {images} of {total} images"
        return f"{self._claims.folder}: {done}, {self._rate()}, about {_duration((total - images) / rate)} left"

    def _rate(self) -> str:
        seconds = self._seconds()
        return f"{self._images / seconds:.0f} images/s and {self._bytes / seconds / 1e6:.1f} MB/s here"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def _images_committed(self) -> int:
        return sum(self._sizes[name] for name in self._claims.done())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
