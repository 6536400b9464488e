"""Fetching remote shards before they are needed, in the order of the plan, in a thread of its own.

It never decides what is read: whoever needs a shard fetches it too, and finds it here, or waits, or meets the error.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, Queue

from data_pipeline.loading.plan import Need
from data_pipeline.shards.index import ShardEntry


class Prefetcher:
    """Calls `fetch` for each shard, at most `ahead` of them before the stream has reached the place of their need."""

    def __init__(self, fetch: Callable[[int], object], needs: Iterator[Need], *, ahead: int) -> None:
        """Prepare to fetch shards by number. The errors of `fetch` end nothing: the reader meets them again."""
        self._fetch = fetch
        self._needs = needs
        self._ahead = ahead
        self._early: deque[int] = deque()  # positions in the stream of what was asked for before its time
        self._wanted: Queue[int | None] = Queue()
        self._let_go = weakref.finalize(self, _end, self._wanted)
        self._thread: threading.Thread | None = None

    def reached(self, position: int) -> None:
        """Note that the stream is asked for up to this position, and fetch what comes next."""
        while self._early and self._early[0] < position:
            self._early.popleft()
        while len(self._early) < self._ahead and self._let_go.alive:
            need = next(self._needs)
            if need.position >= position:  # else who needs it fetches it, or has had it
                self._early.append(need.position)
                self._wanted.put(need.shard)
        if self._thread is None and self._ahead:
            arguments = (self._fetch, self._wanted)
            self._thread = threading.Thread(target=_fetch_all, args=arguments, name="prefetch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Fetch nothing more. A download that has begun may go on for as long as the process lives."""
        self._let_go()


def _fetch_all(fetch: Callable[[int], object], wanted: Queue[int | None]) -> None:
    while (shard := wanted.get()) is not None:
        with suppress(OSError, ValueError):
            fetch(shard)


def _end(wanted: Queue[int | None]) -> None:
    with suppress(Empty):
        while True:
            wanted.get_nowait()
    wanted.put(None)


def bytes_at_once(shards: Sequence[ShardEntry], *, window: int, ahead: int) -> int:
    """Return how many bytes the shards of one window's samples and `ahead` more shards can take at most."""
    filled = sorted(shard.samples for shard in shards if shard.samples)
    number, samples = 0, 0
    while number < len(filled) and samples + filled[number] <= window:
        samples += filled[number]
        number += 1
    most = number + 2 + ahead  # a window may begin and end inside of a shard
    return sum(heapq.nlargest(most, (shard.bytes for shard in shards if shard.samples)))
