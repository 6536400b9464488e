"""Fetches shards before they are needed, in the order of the plan, in a thread of its own.

It never decides what is read: whoever needs a shard fetches it too, and finds it here, or waits, or meets the error.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from data_pipeline.loading.plan import Need

if TYPE_CHECKING:
    from data_pipeline.shards.index import ShardEntry

CLOSE_SECONDS = 1.0


class Prefetcher:
    """Calls `fetch` for each shard, at most `ahead` of them before the stream has reached the place of their need."""

    def __init__(self, fetch: Callable[[int], object], wanted: Iterator[Need], *, ahead: int) -> None:
        """fetch: by the shard's number; its errors end nothing, the reader meets them again."""
        self._fetch = fetch
        self._wanted = wanted
        self._ahead = ahead
        self._reached = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def reached(self, position: int) -> None:
        """Say that everything before this stream position is asked for."""
        with self._changed:
            self._reached = max(self._reached, position)
            self._changed.notify()

    def close(self) -> None:
        """Fetch nothing more. A download that has begun may go on for as long as the process lives."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        early: deque[int] = deque()  # places in the stream of what was fetched before its time
        for need in self._wanted:
            early.append(need.position)
            if not self._wait_for_turn(early):
                return
            if not early:
                continue  # the stream is past it: who needs it fetches it, or has had it
            try:
                self._fetch(need.shard)
            except (OSError, ValueError):
                continue

    def _wait_for_turn(self, early: deque[int]) -> bool:
        """Until no more than `ahead` are early, the last of them included. False: closed."""
        with self._changed:
            while not self._is_closed:
                while early and early[0] < self._reached:
                    early.popleft()
                if len(early) <= self._ahead:
                    return True
                self._changed.wait()
        return False


def bytes_at_once(shards: Sequence[ShardEntry], *, window: int, ahead: int) -> int:
    """Bytes of the shards that the samples of one window and `ahead` more shards can take at most."""
    filled = sorted(shard.samples for shard in shards if shard.samples)
    number, samples = 0, 0
    while number < len(filled) and samples + filled[number] <= window:
        samples += filled[number]
        number += 1
    most = number + 2 + ahead  # a window may begin and end inside of a shard
    return sum(heapq.nlargest(most, (shard.bytes for shard in shards if shard.samples)))
