"""Worker processes that read ahead: map(read, requests), in order, without making the trainer wait."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Generic, NoReturn, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from data_pipeline.files.signals import STOP_SIGNALS

TIMEOUT_SECONDS = 300.0  # a worker that is silent for longer is an error, not a wait without end
LOOK_SECONDS = 1.0  # between two looks whether the workers are alive, while there is nothing to receive
SILENCE = re.compile(r"DataLoader timed out|DataLoader worker .* exited unexpectedly")
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal for when the parent dies

Request = TypeVar("Request")
Result = TypeVar("Result")


class WorkerFailed(OSError):
    """A worker process died, or does not answer; not an error in the data, which comes as it was raised."""

    exit_code: ClassVar[int] = 71


class ReadAhead(Iterator[Result]):
    """The results of `read` for each request, in order, made by `workers` processes.

    A request's text, str(request), is what an error calls it.
    """

    def __init__(self, read: Callable[[Request], Result], requests: Iterator[Request], *, workers: int) -> None:
        self._asked: deque[Request] = deque()
        loader = DataLoader(
            _Reader(read),
            sampler=_remember(requests, self._asked),
            batch_size=None,  # a request is a batch already
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=partial(_serve, os.getpid()),
            timeout=LOOK_SECONDS,
            generator=torch.Generator(),  # or the number of workers would move the global generator
        )
        self._results = iter(loader)
        _raise_nothing_on_sigchld(self._results)
        atexit.register(_stop_if_alive, weakref.ref(self._results))

    def __next__(self) -> Result:
        """Raises WorkerFailed, and whatever ValueError or OSError `read` raised."""
        result = self._receive()
        if isinstance(result, Exception):
            self.close()
            raise result
        self._asked.popleft()
        return result

    def _receive(self) -> Result | Exception:
        give_up = time.monotonic() + TIMEOUT_SECONDS
        while True:
            try:
                return next(self._results)
            except RuntimeError as error:
                if not SILENCE.match(str(error)):
                    raise
            dead = [worker for worker in self._results._workers if not worker.is_alive()]
            if dead or time.monotonic() > give_up:
                self._fail(dead)

    def _fail(self, dead: list[torch.multiprocessing.Process]) -> NoReturn:
        workers = dead or self._results._workers
        pids = ", ".join(str(worker.pid) for worker in workers)
        how = _ending(dead[0].exitcode) if dead else f"has been silent for {TIMEOUT_SECONDS:g} s"
        advice = "if memory ran out, lower data.workers" if dead else "look at the storage that the data is on"
        awaited = self._asked[0]
        for worker in self._results._workers:
            worker.kill()  # none is asked to end: it may be stuck, or wait for a lock that the dead one held
        self.close()
        raise WorkerFailed(f"data worker (pid {pids}) {how}; next to come was {awaited}; {advice}")

    def close(self) -> None:
        """Stop the workers; there are no more results."""
        _stop_workers(self._results)
        self._results = iter(())


def _remember(requests: Iterator[Request], asked: deque[Request]) -> Iterator[Request]:
    """Not a method: an iterator that refers to its owner would be collected late, and its workers with it."""
    for request in requests:
        asked.append(request)
        yield request


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _raise_nothing_on_sigchld(results: Iterator[Result | Exception]) -> None:
    # torch would raise wherever the trainer happens to be when a worker dies: in a collective, in a save. Here the
    # error comes when the next result is asked for.
    signal_handling._remove_worker_pids(id(results))
    results._worker_pids_set = False


@dataclass(frozen=True)
class _Reader(Generic[Request, Result]):
    """`read` as the DataLoader wants it. Errors come back as values: it would wrap them in a traceback."""

    read: Callable[[Request], Result]

    def __getitem__(self, request: Request) -> Result | Exception:
        try:
            return self.read(request)
        except (ValueError, OSError) as error:
            return error


def _unchanged(result: Result) -> Result:
    return result


def _serve(trainer: int, worker: int) -> None:
    # Schedulers signal every process of a job; the trainer decides when to stop, and needs its workers until then.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A worker in the middle of a read would not notice by itself that there is nobody left to read for.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(0)


def _stop_workers(results: Iterator[Result | Exception]) -> None:
    # Done by hand, because workers ignore the SIGTERM by which multiprocessing would stop them when the program ends,
    # and a traceback can keep the iterator from being collected before: the program would wait for them forever.
    if workers := getattr(results, "_workers", []):
        results._shutdown_workers()
        for worker in workers:
            worker.kill()  # one that is stuck in a read


def _stop_if_alive(reference: weakref.ref[Iterator[Result | Exception]]) -> None:
    if (results := reference()) is not None:
        _stop_workers(results)
