"""Reading ahead is the iterator itself: the same items, errors in their turn, and no thread or process left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from workers import wait_for

from data_pipeline.loading import ahead
from data_pipeline.loading.ahead import ThreadAhead, WorkerFailed, Workers


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "read ahead"}


def processes() -> set[int | None]:
    return {process.pid for process in active_children()}


def square_unless_13(number: int) -> int:
    if number == 13:
        raise ValueError("13 is damaged")
    return number**2


def slow_from_13(number: int) -> int:
    if number >= 13:
        time.sleep(30)
    return number


def slowly(number: int) -> int:
    time.sleep(0.1)
    return number


def divide(number: int) -> float:
    return 1 / number


def make_tensor(number: int) -> torch.Tensor:
    return torch.full((1000,), number)


def in_a_thread(requests: Iterator[int]) -> ThreadAhead[int]:
    return ThreadAhead(map(square_unless_13, requests), ahead=2)


def in_processes(requests: Iterator[int]) -> Workers[int, int]:
    return Workers(square_unless_13, requests, workers=2)


Ahead = Callable[[Iterator[int]], Any]
BOTH = pytest.mark.parametrize("make", [in_a_thread, in_processes])


@BOTH
def test_items_come_in_order_and_end(make: Ahead) -> None:
    assert list(make(iter(range(12)))) == [number**2 for number in range(12)]
    assert not threads() and not processes()


@BOTH
def test_an_error_comes_in_its_turn_as_it_was_raised_and_is_the_last(make: Ahead) -> None:
    items = make(count(11))
    assert [next(items), next(items)] == [121, 144]
    with pytest.raises(ValueError, match="^13 is damaged$"):
        next(items)
    assert list(items) == [] and not threads() and not processes()


@BOTH
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_ends_it(make: Ahead, taken: int) -> None:
    items = make(count(20))
    assert list(islice(items, taken)) == [number**2 for number in range(20, 20 + taken)]
    items.close()
    assert list(items) == [] and not threads() and not processes()


@BOTH
def test_letting_go_ends_it(make: Ahead) -> None:
    items = make(count(20))
    next(items)
    del items
    gc.collect()
    assert not threads() and not processes()


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('the trainer failed')"])
@pytest.mark.parametrize("made", ["ThreadAhead(count(), ahead=2)", "Workers(abs, count(), workers=2)"])
def test_a_program_that_does_not_close_it_still_ends(made: str, ending: str) -> None:
    program = (
        "import weakref; owner = type('Owner', (), {})(); weakref.finalize(owner, int)\n"  # an early one
        "from itertools import count; from data_pipeline.loading.ahead import ThreadAhead, Workers\n"
        f"items = {made}\nheld = vars(items)  # as a traceback would\nprint(next(items))\n{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n" and done.returncode == (1 if ending else 0)
    assert done.stderr == "" or "the trainer failed" in done.stderr


# threads


@pytest.mark.parametrize("length", [1, 2, 50])
def test_items_are_made_ahead_but_no_further_than_asked(length: int) -> None:
    made: list[int] = []
    items = ThreadAhead(map(made.append, count()), ahead=length)
    next(items)
    wait_for(lambda: len(made) == length + 2)  # one taken, those ready, and one that waits to be put beside them
    time.sleep(0.05)
    assert len(made) == length + 2
    items.close()


def test_an_error_of_the_preparation_is_that_of_the_first_item() -> None:
    def fail() -> None:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        next(ThreadAhead(iter([1]), ahead=1, prepare=fail))


def test_closing_does_not_wait_for_an_item_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "CLOSE_SECONDS", 0.1)
    goes_on = threading.Event()
    items = ThreadAhead((goes_on.wait() for _ in count()), ahead=1)
    start = time.monotonic()
    items.close()
    assert time.monotonic() - start < 2 and list(items) == []
    goes_on.set()
    for thread in threads():
        thread.join(5)


# processes


def test_tensors_come_whole_from_workers() -> None:
    results = Workers(make_tensor, iter(range(20)), workers=3)
    assert [result.unique().item() for result in list(results)] == list(range(20))


def test_workers_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert len(list(Workers(make_tensor, iter(range(3)), workers=1))) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_outlive_a_signal_to_the_job() -> None:
    """The trainer decides when to stop, and needs its batches until then."""
    results = in_processes(count(20))
    next(results)
    for child in processes():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(child, number)
    assert list(islice(results, 6)) == [number**2 for number in range(21, 27)]
    results.close()


def test_a_worker_that_was_killed_is_one_line_in_its_turn() -> None:
    results = Workers(slow_from_13, count(12), workers=1)
    assert next(results) == 12
    (worker,) = processes()
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.1)  # nothing is raised here, where the trainer may be in the middle of a save
    with pytest.raises(WorkerFailed) as caught:
        next(results)
    assert str(caught.value).startswith(f"data worker (pid {worker}) was killed by SIGKILL; next to come was 13; if")
    assert list(results) == [] and not processes()


def test_a_worker_that_ends_is_one_line() -> None:
    results = Workers(os._exit, iter([3]), workers=1)
    with pytest.raises(WorkerFailed, match="ended with exit code 3; next to come was 3"):
        next(results)


def test_a_worker_that_is_stuck_is_one_line_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "TIMEOUT_SECONDS", 0.3)
    results = Workers(slow_from_13, count(13), workers=2)
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"has been silent for 0.3 s; next to come was 13; look at the storage"):
        next(results)
    assert time.monotonic() - start < 5 and not processes()


def test_a_slow_worker_is_waited_for() -> None:
    assert list(Workers(slowly, iter(range(3)), workers=1)) == [0, 1, 2]


def test_an_error_of_the_program_keeps_its_kind_and_tells_its_place() -> None:
    results = Workers(divide, iter([0]), workers=1)
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert "in divide" in caught.value.__notes__[0]


def test_workers_do_not_outlive_a_trainer_that_was_killed(tmp_path: Path) -> None:
    """Also one that is in the middle of a read, and so does not look around."""
    trainer = os.fork()
    if trainer == 0:
        results = Workers(slow_from_13, count(13), workers=2)
        (tmp_path / "workers.tmp").write_text(" ".join(map(str, processes())))
        (tmp_path / "workers.tmp").rename(tmp_path / "workers")
        next(results)
        os._exit(1)
    wait_for((tmp_path / "workers").exists)
    time.sleep(0.3)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    workers = [Path(f"/proc/{pid}/stat") for pid in (tmp_path / "workers").read_text().split()]
    assert len(workers) == 2
    wait_for(lambda: not any(map(runs, workers)))


def runs(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
