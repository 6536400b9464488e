"""A thread ahead is the iterator itself: the same items, the same error in its turn, and no thread is left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest
from repository import ROOT

from data_pipeline.loading import read_thread
from data_pipeline.loading.read_thread import ThreadAhead


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "read ahead"}


def squares_until_13(start: int) -> Iterator[int]:
    for number in count(start):
        if number == 13:
            raise ValueError("13 is damaged")
        yield number**2


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_items_come_in_order_and_end(ahead: int) -> None:
    assert list(ThreadAhead(iter(range(20)), ahead=ahead)) == list(range(20)) and not threads()


def test_items_are_made_ahead_but_no_further_than_asked() -> None:
    made: list[int] = []
    items = ThreadAhead(map(made.append, count()), ahead=3)
    assert next(items) is None
    end = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three ready, and one that waits to be put beside them
    items.close()


def test_an_error_comes_in_its_turn_and_ends_the_thread() -> None:
    items = ThreadAhead(squares_until_13(11), ahead=5)
    assert [next(items), next(items)] == [121, 144]
    with pytest.raises(ValueError, match="^13 is damaged$"):
        next(items)
    assert list(items) == [] and not threads()


def test_an_error_of_the_preparation_is_that_of_the_first_item() -> None:
    def fail() -> None:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        next(ThreadAhead(iter([1]), ahead=1, prepare=fail))


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_ends_the_thread_and_then_its_source(taken: int) -> None:
    closed: list[bool] = []
    items = ThreadAhead(count(), ahead=2, close=lambda: closed.append(bool(threads())))
    assert list(islice(items, taken)) == list(range(taken))
    items.close()
    assert list(items) == [] and closed == [False]


def test_letting_go_ends_the_thread() -> None:
    items = ThreadAhead(count(), ahead=2)
    next(items)
    del items
    gc.collect()
    assert not threads()


def test_closing_does_not_wait_for_an_item_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_thread, "CLOSE_SECONDS", 0.1)
    goes_on = threading.Event()
    items = ThreadAhead(map(lambda number: goes_on.wait(), count()), ahead=1)
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 2 and list(items) == []
    goes_on.set()
    for thread in threads():
        thread.join(5)


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('the trainer failed')"])
def test_a_program_that_does_not_close_it_still_ends(ending: str) -> None:
    program = (
        "from itertools import count; from data_pipeline.loading.read_thread import ThreadAhead\n"
        f"items = ThreadAhead(count(), ahead=2)\nprint(next(items))\n{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n" and done.returncode == (1 if ending else 0)
    assert done.stderr == "" or "the trainer failed" in done.stderr
