"""Files behind http(s) and s3 URLs, from servers that fail, stall, break off, or send something else.

Every read is tried again a bounded number of times and goes on where the last one ended; nothing is believed about
sizes before it is seen. May be sent to other processes and used after a fork: each has connections of its own.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from random import SystemRandom
from typing import Any, ClassVar

from data_pipeline.files.urls import without_query
from data_pipeline.remote.connections import PIECE_BYTES, Absent, Body, Connections, Interrupted, Refused

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds between two tries: doubled each time, and up to half of it left out


class RemoteError(OSError):
    """A server did not deliver. The message names the URL without its query, what happened last, and what to do."""

    exit_code: ClassVar[int] = 69


class WrongSize(Exception):
    """The server has another file than was expected, by its size. The text says which size."""


class Downloads:
    """Reads whole files. For many threads at once."""

    def __init__(self, *, stall_seconds: float, retries: int) -> None:
        """stall_seconds: how long a server may be silent; retries: how often in a row a read is tried again."""
        self.stall_seconds = stall_seconds
        self.retries = retries
        self._connections: dict[int, Connections] = {}  # by process; the parent's are kept, not closed, after a fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": {}}

    def size_of(self, url: str) -> int:
        """Bytes of a file. Raises FileNotFoundError, and RemoteError if the server does not say."""
        tries = Tries(url, self.retries)
        while True:
            try:
                with self._open(url, stop=1) as body:  # not HEAD: a signed URL is good for GET alone
                    if body.total is None:
                        raise Refused("the server does not say how large it is; it must send Content-Length")
                    body.read(2)  # one byte and the end, after which the connection can be used again
                    return body.total
            except Interrupted as error:
                tries.failed(error)

    def read_small(self, url: str, *, max_bytes: int) -> bytes:
        """A file in memory. Raises FileNotFoundError, ValueError if it is larger than that, and RemoteError."""
        tries = Tries(url, self.retries)
        while True:
            try:
                with self._open(url) as body:
                    content = _read_up_to(body, max_bytes + 1)
                if len(content) > max_bytes:
                    raise ValueError(f"{without_query(url)}: more than {max_bytes} bytes, and no more are accepted")
                return content
            except Interrupted as error:
                tries.failed(error)

    def copy(self, url: str, descriptor: int, *, size: int) -> str:
        """Write `size` bytes to an open file, never more, going on after errors; their sha256.

        Raises FileNotFoundError, RemoteError, and WrongSize if the server has another number of bytes.
        """
        tries = Tries(url, self.retries)
        copying = _Copy(descriptor, size)
        while copying.done < size:
            best = copying.best
            try:
                with self._open(url, start=copying.done) as body:
                    copying.take(body)
            except Interrupted as error:
                if copying.best >= best + PIECE_BYTES:
                    tries.succeeded()
                tries.failed(error)
        return copying.digest.hexdigest()

    @contextmanager
    def _open(self, url: str, *, start: int = 0, stop: int | None = None) -> Iterator[Body]:
        process = os.getpid()
        if process not in self._connections:
            self._connections.setdefault(process, Connections(self.stall_seconds))  # threads: the first one stays
        place = without_query(url)
        try:
            body = self._connections[process].open(url, start=start, stop=stop)
            try:
                yield body
            finally:
                body.close()
        except Absent:
            raise FileNotFoundError(f"{place}: no such file; copy or pack it again, or correct the URL") from None
        except Refused as error:
            raise RemoteError(f"{place}: {error}") from None


class Tries:
    """Counts failures in a row, waits after each, and gives up in the end."""

    def __init__(self, url: str, retries: int) -> None:
        self._place = without_query(url)
        self._retries = retries
        self._failures = 0

    def failed(self, error: Interrupted) -> None:
        """Wait before the next try. Raises RemoteError if there is none."""
        self._failures += 1
        if self._failures > self._retries:
            raise RemoteError(
                f"{self._place}: not delivered in {self._failures} tries, at last: {error};"
                " look at the server and the network, then run the same command again"
            ) from None
        pause = min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE)
        time.sleep(pause * SystemRandom().uniform(0.5, 1))  # the global generators belong to the training

    def succeeded(self) -> None:
        self._failures = 0


class _Copy:
    """A file that is being written from one body after another. best: bytes it had at most, even if it began anew."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size
        self.done = self.best = 0
        self.digest = hashlib.sha256()
        self._version = ""

    def take(self, body: Body) -> None:
        """Write what comes. Raises Interrupted unless all is there then."""
        if body.total not in (None, self.size):
            raise WrongSize(f"{body.total} bytes")
        if self.done and (body.start != self.done or body.version != self._version):
            self.done, self.digest = 0, hashlib.sha256()
        if body.start != self.done:
            raise Interrupted("the server sends other bytes than were asked for")
        self._version = body.version
        while piece := body.read(self.size - self.done + 1):
            self._write(piece)
            if self.done == self.size and body.total is not None:
                return
        if self.done < self.size:
            raise Interrupted(f"it ended after {self.done} of {self.size} bytes")

    def _write(self, piece: bytes) -> None:
        if self.done + len(piece) > self.size:
            raise WrongSize(f"more than {self.size} bytes")
        self.digest.update(piece)
        left = memoryview(piece)
        while left:
            written = os.pwrite(self.descriptor, left, self.done)
            left, self.done = left[written:], self.done + written
        self.best = max(self.best, self.done)


def _read_up_to(body: Body, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while size < limit and (piece := body.read(limit - size)):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
