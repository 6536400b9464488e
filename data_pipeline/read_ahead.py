"""Worker processes that read ahead: map(read, requests), in order, without making the trainer wait."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader

TIMEOUT_SECONDS = 300  # a worker that is silent for longer is an error, not a wait without end

Request = TypeVar("Request")
Result = TypeVar("Result")


class ReadAhead(Iterator[Result]):
    """The results of `read` for each request, in order, made by `workers` processes."""

    def __init__(self, read: Callable[[Request], Result], requests: Iterator[Request], *, workers: int) -> None:
        loader = DataLoader(
            _Reader(read),
            sampler=requests,
            batch_size=None,  # a request is a batch already
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_the_trainer,
            timeout=TIMEOUT_SECONDS,
            generator=torch.Generator(),  # or the number of workers would move the global generator
        )
        self._results = iter(loader)
        atexit.register(_stop_if_alive, weakref.ref(self._results))

    def __next__(self) -> Result:
        result = next(self._results)
        if isinstance(result, Exception):
            self.close()
            raise result
        return result

    def close(self) -> None:
        """Stop the workers; there are no more results."""
        _stop_workers(self._results)
        self._results = iter(())


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


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Schedulers signal every process of a job; the trainer decides when to stop, and needs its workers until then.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


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
