"""Lines that say how far work on shards has come: of all workers together, as fast as they have been so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from data_pipeline.making.claims import Claims

EVERY_SECONDS = 5.0


class Progress:
    """Counts images, and now and then says how many are done, how fast, and how long the rest will take."""

    def __init__(
        self,
        claims: Claims,
        sizes: Mapping[str, int],
        *,
        report: Callable[[str], None],
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        """sizes: the number of images of each shard."""
        self._claims = claims
        self._sizes = sizes
        self._report = report
        self._every_seconds = every_seconds
        self._started = self._said = time.monotonic()
        self._images_before = self._images_committed()
        self._in_shard = 0
        self.images = 0  # by this process
        self.bytes = 0

    def begin_shard(self) -> None:
        self._in_shard = 0

    def add(self, images: int, num_bytes: int) -> None:
        """Count images of the current shard and their bytes."""
        self._in_shard += images
        self.images += images
        self.bytes += num_bytes
        if time.monotonic() - self._said >= self._every_seconds:
            self._report(self.line())
            self._said = time.monotonic()

    def line(self) -> str:
        """Where the work stands."""
        total, committed = sum(self._sizes.values()), self._images_committed()
        images = min(total, committed + self._in_shard)
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = max(images - self._images_before, 1) / seconds
        done = f"{len(self._claims.done())} of {len(self._sizes)} shards done, {images} of {total} images"
        return f"{self._claims.folder}: {done}, {self.rate()}, about {_duration((total - images) / rate)} left"

    def rate(self) -> str:
        """How fast this process is."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self.images / seconds:.0f} images/s and {self.bytes / seconds / 1e6:.1f} MB/s here"

    def summary(self) -> str:
        """What this process has done, and how fast."""
        return f"{self.images} images by this process in {_duration(time.monotonic() - self._started)}: {self.rate()}"

    def _images_committed(self) -> int:
        return sum(self._sizes[name] for name in self._claims.done())


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
