"""Shards are fetched in the order of their need, a bounded number of them ahead, and nobody waits for that."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest
from workers import wait_for

from data_pipeline.loading.plan import Need
from data_pipeline.loading.prefetch import Prefetcher, bytes_at_once
from data_pipeline.shards.index import ShardEntry


def entry(number: int, samples: int, size: int) -> ShardEntry:
    return ShardEntry(f"shard-{number:06d}.tar", samples, size, "0" * 64, "0" * 64)


def test_no_more_than_ahead_are_fetched_before_the_stream_is_there() -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, (Need(10 * shard, shard) for shard in count()), ahead=3)
    prefetcher.start()
    wait_for(lambda: fetched == [0, 1, 2])
    prefetcher.reached(11)  # shards 0 and 1 are needed before that
    wait_for(lambda: fetched == [0, 1, 2, 3, 4])
    time.sleep(0.05)
    assert fetched == [0, 1, 2, 3, 4]
    prefetcher.close()


def test_what_the_stream_has_passed_is_left_to_the_readers() -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, (Need(10 * shard, shard) for shard in count()), ahead=1)
    prefetcher.reached(1001)
    prefetcher.start()
    wait_for(lambda: fetched == [101])
    prefetcher.close()


def test_none_ahead_is_none() -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, (Need(shard, shard) for shard in count()), ahead=0)
    prefetcher.start()
    prefetcher.reached(5)
    time.sleep(0.05)
    prefetcher.close()
    assert fetched == []


@pytest.mark.parametrize("error", [OSError("away"), ValueError("damaged")])
def test_errors_are_left_to_the_readers(error: Exception) -> None:
    fetched: list[int] = []

    def fetch(shard: int) -> None:
        fetched.append(shard)
        raise error

    prefetcher = Prefetcher(fetch, (Need(shard, shard) for shard in count()), ahead=2)
    prefetcher.start()
    wait_for(lambda: fetched == [0, 1])
    prefetcher.close()


def test_closing_does_not_wait_for_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.loading.prefetch.CLOSE_SECONDS", 0.05)
    never = threading.Event()
    prefetcher = Prefetcher(lambda shard: never.wait(5), (Need(shard, shard) for shard in count()), ahead=2)
    prefetcher.start()
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 1
    never.set()


def test_an_idle_prefetcher_ends_when_closed() -> None:
    prefetcher = Prefetcher(lambda shard: None, (Need(9, shard) for shard in count()), ahead=1)
    prefetcher.start()
    prefetcher.close()
    assert not prefetcher._thread.is_alive()


def test_room_for_a_window_and_what_is_ahead() -> None:
    shards = [entry(number, 10, 10_000) for number in range(20)] + [entry(20, 0, 10_240)]
    assert bytes_at_once(shards, window=30, ahead=4) == 90_000  # three, one cut at each end, four ahead
    assert bytes_at_once(shards, window=1, ahead=0) == 20_000
    assert bytes_at_once(shards, window=10**6, ahead=4) == 200_000  # all there are
