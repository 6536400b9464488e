"""A thread that takes items from an iterator ahead of their time, while the thread that needs them computes.

Where making an item is little Python and much reading, decoding or copying, which let other threads run, this hides it
behind the step without what processes cost: a start of seconds, a copy of the program, a copy of every batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

CLOSE_SECONDS = 2.0  # for a thread in the middle of an item; it is a daemon and ends with the program at the latest
LOOK_SECONDS = 0.1  # between two looks whether anybody still wants what is ready

Item = TypeVar("Item")


class ThreadAhead(Iterator[Item], Generic[Item]):
    """The items of an iterator, in order; up to `ahead` of them wait, ready, and one more is being made.

    An exception comes in its turn, as it was raised, and is the last. What `items` uses must not be used elsewhere.
    """

    def __init__(
        self,
        items: Iterator[Item],
        *,
        ahead: int,
        prepare: Callable[[], None] | None = None,
        close: Callable[[], None] | None = None,
    ) -> None:
        """prepare: called in the thread before its first item. close: ends what the items come from."""
        self._close_source = close
        self._line = _Line(ahead)
        self._is_over = False
        # The thread does not know this object, or nobody could let go of it and the thread would never end.
        self._thread = threading.Thread(target=_fill, args=(items, self._line, prepare), name="read ahead", daemon=True)
        self._let_go = weakref.finalize(self, _end, self._thread, self._line)
        self._thread.start()

    def __next__(self) -> Item:
        """Raises what making this item raised."""
        if self._is_over:
            raise StopIteration
        item, error = self._line.take()
        if error is not None:
            self.close()
            raise error
        return item

    def close(self) -> None:
        """Stop the thread, then what it takes the items from; there are no more items."""
        self._is_over = True
        self._let_go()
        if self._close_source is not None:
            self._close_source()


class _Line:
    """What is ready, between the two threads: (item, no error), or (nothing, the error that ends the line)."""

    def __init__(self, length: int) -> None:
        self._ready: Queue[tuple[object, BaseException | None]] = Queue(length)
        self._is_wanted = True

    def take(self) -> tuple[object, BaseException | None]:
        return self._ready.get()

    def put(self, item: object, error: BaseException | None = None) -> bool:
        """False: nobody wants it any more."""
        while self._is_wanted:
            try:
                self._ready.put((item, error), timeout=LOOK_SECONDS)
                return True
            except Full:
                continue
        return False

    def close(self) -> None:
        self._is_wanted = False
        try:
            while True:  # makes room for one that is just being put
                self._ready.get_nowait()
        except Empty:
            pass


def _fill(items: Iterator[object], line: _Line, prepare: Callable[[], None] | None) -> None:
    try:
        if prepare is not None:
            prepare()
        for item in items:
            if not line.put(item):
                return
        line.put(None, StopIteration())
    except BaseException as error:  # whatever it is, the thread that asks for the next item is to meet it
        line.put(None, error)


def _end(thread: threading.Thread, line: _Line) -> None:
    line.close()
    thread.join(CLOSE_SECONDS)
