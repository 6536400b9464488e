"""Shards are fetched in the order of their need, a bounded number of them ahead, and nobody waits for that."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest
from workers import wait_for

from data_pipeline.loading.plan import Need
from data_pipeline.loading.prefetch import Prefetcher, bytes_at_once
from data_pipeline.shards.index import ShardEntry


def needs() -> Iterator[Need]:
    """Every tenth position of the stream needs another shard."""
    return (Need(10 * shard, shard) for shard in count())


def entry(number: int, samples: int, size: int) -> ShardEntry:
    return ShardEntry(f"shard-{number:06d}.tar", samples, size, "0" * 64, "0" * 64)


def test_no_more_than_ahead_are_fetched_before_the_stream_is_there() -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, needs(), ahead=3)
    prefetcher.reached(0)
    wait_for(lambda: fetched == [0, 1, 2])
    prefetcher.reached(11)  # shards 0 and 1 are needed before that
    wait_for(lambda: fetched == [0, 1, 2, 3, 4])
    time.sleep(0.05)
    assert fetched == [0, 1, 2, 3, 4]
    prefetcher.close()


def test_what_the_stream_has_passed_is_left_to_the_readers() -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, needs(), ahead=1)
    prefetcher.reached(1001)
    wait_for(lambda: fetched == [101])
    prefetcher.close()


def test_none_ahead_is_none() -> None:
    prefetcher = Prefetcher(lambda shard: pytest.fail("fetched"), needs(), ahead=0)
    prefetcher.reached(5)
    time.sleep(0.05)
    prefetcher.close()


@pytest.mark.parametrize("error", [OSError("away"), ValueError("damaged")])
def test_errors_are_left_to_the_readers(error: Exception) -> None:
    fetched: list[int] = []

    def fetch(shard: int) -> None:
        fetched.append(shard)
        raise error

    prefetcher = Prefetcher(fetch, needs(), ahead=2)
    prefetcher.reached(0)
    wait_for(lambda: fetched == [0, 1])
    prefetcher.close()


def test_closing_neither_waits_for_a_download_nor_begins_another() -> None:
    fetched: list[int] = []
    goes_on = threading.Event()
    prefetcher = Prefetcher(lambda shard: fetched.append(shard) or goes_on.wait(5), needs(), ahead=2)
    prefetcher.reached(0)
    wait_for(lambda: fetched == [0])
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 1
    goes_on.set()
    wait_for(lambda: all(thread.name != "prefetch" for thread in threading.enumerate()))
    assert fetched == [0]


def test_room_for_a_window_and_what_is_ahead() -> None:
    shards = [entry(number, 10, 10_000) for number in range(20)] + [entry(20, 0, 10_240)]
    assert bytes_at_once(shards, window=30, ahead=4) == 90_000  # three, one cut at each end, four ahead
    assert bytes_at_once(shards, window=1, ahead=0) == 20_000
    assert bytes_at_once(shards, window=10**6, ahead=4) == 200_000  # all there are
