"""In the place of the public code's process: remembers what it was asked for, and says how much memory each work took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from launchers.bench.public_code import PublicCall


class PublicStandIn:
    """`memory_of` a kind of work with its settings is what it says to have taken, in bytes."""

    def __init__(self, memory_of: Callable[..., int]) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.memory_of = memory_of

    def timed(self, what: str, *, batch: int, **settings: Any) -> PublicCall:
        def work() -> dict[str, int]:
            self.asked.append((what, settings | {"batch": batch}))
            taken = self.memory_of(what, batch=batch, **settings)
            return {"working_bytes": taken, "peak_bytes": 10 * taken}

        return PublicCall(work, batch, release=lambda: None)


def stand_in(monkeypatch: pytest.MonkeyPatch, benchmark: ModuleType, memory_of: Callable[..., int]) -> PublicStandIn:
    """Let a benchmark find this where it looks for the public code."""
    found = PublicStandIn(memory_of)

    @contextmanager
    def give(*models: Any) -> Iterator[PublicStandIn]:
        yield found

    monkeypatch.setattr(benchmark, "public_code", give)
    return found
