"""Iterators that make their items ahead of time, in a thread or in worker processes, while the trainer computes.

torch's DataLoader lacks one guarantee that only its private parts could give: when a worker dies it raises wherever the
trainer happens to be, in a collective or a save, and it waits for a worker that is stuck. Here such an error comes when
the next item is asked for, and no process is left behind.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import Full, Queue
from typing import ClassVar, Generic, NoReturn, TypeVar

import torch.multiprocessing

from data_pipeline.files.signals import STOP_SIGNALS

TIMEOUT_SECONDS = 300.0  # a worker that is silent for longer is an error, not a wait without end
REQUESTS_AHEAD = 2  # that each worker has at once
CLOSE_SECONDS = 2.0  # for a thread in the middle of an item; it is a daemon and ends with the program at the latest
LOOK_SECONDS = 0.1  # between two looks of the thread whether anybody still wants what is ready
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for when the parent dies

Item = TypeVar("Item")
Request = TypeVar("Request")
Result = TypeVar("Result")


class WorkerFailed(OSError):
    """A worker process died or does not answer. An error in the data is not one: it comes as it was raised."""

    exit_code: ClassVar[int] = 71


class ThreadAhead(Iterator[Item], Generic[Item]):
    """The items of an iterator, in order; up to `ahead` of them wait, ready, and one more is being made.

    This suits items whose making is little Python and much reading or copying, which let other threads run: a thread
    costs no start, no copy of the program, and no copy of the items. An exception comes in its turn, as it was raised,
    and is the last. What `items` uses must not be used elsewhere.
    """

    def __init__(self, items: Iterator[Item], *, ahead: int, prepare: Callable[[], None] | None = None) -> None:
        """Start the thread, which calls `prepare` before it makes its first item."""
        self._ready: Queue[tuple[Item | None, BaseException | None]] = Queue(ahead)
        self._is_over = threading.Event()
        # The thread does not know this object, or nobody could let go of it and the thread would never end.
        arguments = (items, self._ready, self._is_over, prepare)
        thread = threading.Thread(target=_fill, args=arguments, name="read ahead", daemon=True)
        self._let_go = weakref.finalize(self, _end_thread, thread, self._is_over)
        thread.start()

    def __next__(self) -> Item:
        """Return the next item, or raise what making it raised."""
        if self._is_over.is_set():
            raise StopIteration
        item, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return item  # type: ignore[return-value]  # without an error there is one

    def close(self) -> None:
        """Stop the thread; there are no more items."""
        self._let_go()


def _fill(
    items: Iterator[Item],
    ready: Queue[tuple[Item | None, BaseException | None]],
    is_over: threading.Event,
    prepare: Callable[[], None] | None,
) -> None:
    def put(item: Item | None, error: BaseException | None) -> None:
        while not is_over.is_set():
            with suppress(Full):
                ready.put((item, error), timeout=LOOK_SECONDS)
                return

    try:
        if prepare is not None:
            prepare()
        for item in items:
            put(item, None)
            if is_over.is_set():
                return
        put(None, StopIteration())
    except BaseException as error:  # whatever it is, the thread that asks for the next item is to meet it
        put(None, error)


def _end_thread(thread: threading.Thread, is_over: threading.Event) -> None:
    is_over.set()
    if thread.is_alive():
        thread.join(CLOSE_SECONDS)


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection


class Workers(Iterator[Result], Generic[Request, Result]):
    """The results of `read` for each request, in order, made by worker processes in turn.

    A request's text, str(request), is what an error calls it.
    """

    def __init__(self, read: Callable[[Request], Result], requests: Iterator[Request], *, workers: int) -> None:
        """Fork the workers, and give each its first requests."""
        self._requests = requests
        self._workers = [_start(read) for _ in range(workers)]
        self._turn = cycle(self._workers)
        self._asked: deque[tuple[Request, _Worker]] = deque()
        self._let_go = weakref.finalize(self, _kill, self._workers, os.getpid())
        # Before multiprocessing's own end of a program, which waits for workers that ignore its SIGTERM.
        atexit.register(self._let_go)
        for request in islice(requests, REQUESTS_AHEAD * workers):
            self._ask(request)

    def __next__(self) -> Result:
        """Return the next result. Raises WorkerFailed, and whatever `read` raised."""
        if not self._asked:
            self.close()
            raise StopIteration
        request, worker = self._asked[0]
        found = wait([worker.pipe, worker.process.sentinel], TIMEOUT_SECONDS)
        if not found:
            how = f"(pid {worker.process.pid}) has been silent for {TIMEOUT_SECONDS:g} s"
            self._fail(f"{how}; next to come was {request}; look at the storage that the data is on")
        try:
            if worker.pipe not in found:
                raise EOFError
            result = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            how = f"(pid {worker.process.pid}) {_ending(worker.process.exitcode)}"
            self._fail(f"{how}; next to come was {request}; if memory ran out, lower data.workers")
        if isinstance(result, Exception):
            self.close()
            raise result
        self._asked.popleft()
        for following in islice(self._requests, 1):
            self._ask(following)
        return result

    def close(self) -> None:
        """Stop the workers; there are no more results."""
        self._asked.clear()
        atexit.unregister(self._let_go)
        self._let_go()

    def _ask(self, request: Request) -> None:
        worker = next(self._turn)
        with suppress(OSError):  # that it is dead is told when its answer is asked for
            worker.pipe.send(request)
        self._asked.append((request, worker))

    def _fail(self, what: str) -> NoReturn:
        self.close()
        raise WorkerFailed(f"data worker {what}")


def _start(read: Callable[[Request], Result]) -> _Worker:
    context = torch.multiprocessing.get_context("fork")  # tensors go through shared memory
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(read, theirs, os.getpid()), name="data worker", daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(read: Callable[[Request], Result], pipe: Connection, trainer: int) -> None:
    # Schedulers signal every process of a job; the trainer decides when to stop, and needs its workers until then.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A worker in the middle of a read would not notice by itself that there is nobody left to read for.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(0)
    torch.set_num_threads(1)
    with suppress(EOFError):
        while True:
            request = pipe.recv()
            try:
                pipe.send(read(request))
            except (ValueError, OSError) as error:
                pipe.send(error)
            except Exception as error:  # of the program, whose place matters
                error.add_note(traceback.format_exc())
                pipe.send(error)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _kill(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked child, to which they do not belong
        return
    for worker in workers:
        worker.process.kill()  # none is asked to end: it may be stuck, or wait for a lock that a dead one held
    for worker in workers:
        worker.process.join()
        worker.pipe.close()
