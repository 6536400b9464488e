"""From metrics on every rank's device to numbers in the record: one reduction a window of steps, and progress lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.engine.distributed import World, sum_over_ranks
from training.tracking.record import Record


class TimedIterator:
    """Passes items through, calls `beat` before and after each wait, and adds up the seconds spent waiting."""

    def __init__(self, items: Iterator[Any], beat: Callable[[str], None] = lambda doing: None) -> None:
        self._items = items
        self._beat = beat
        self._waited = 0.0

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Any:
        start = time.monotonic()
        self._beat("waiting for data")
        try:
            return next(self._items)
        finally:
            self._waited += time.monotonic() - start
            self._beat("computing")

    def take_waited(self) -> float:
        """Return the seconds waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop what reads ahead, if anything does."""
        if hasattr(self._items, "close"):
            self._items.close()


@dataclass
class Step:
    """One training step: its record so far, this rank's metrics, and where its samples lie in the stream."""

    record: Record
    metrics: dict[str, Tensor]
    first_sample: int
    next_sample: int


class StepWindow:
    """The steps whose metrics are still on the device, and the time since the window was begun."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.restart()

    def restart(self) -> None:
        """Begin a window without steps, from now on."""
        self._steps: list[Step] = []
        self._start = time.monotonic()

    def add(self, step: Step) -> None:
        """Add a step that was just taken."""
        self._steps.append(step)

    def fetch(self) -> tuple[list[Step], float]:
        """Return the steps, with their metrics' means over the ranks in their records, and the seconds they took.

        A new window begins. A collective.
        """
        steps, start = self._steps, self._start
        for step, values in zip(steps, mean_over_ranks([step.metrics for step in steps], self._world), strict=True):
            step.record |= values
        self.restart()
        return steps, self._start - start


def mean_over_ranks(metrics: list[dict[str, Tensor]], world: World) -> list[dict[str, Any]]:
    """Average each step's scalars and vectors over the ranks, with one reduction and one copy to the host for all.

    All steps have the same metrics, of the same shapes.
    """
    names = list(metrics[0])
    sizes = [metrics[0][name].numel() for name in names]
    flat = torch.stack([torch.cat([step[name].double().flatten() for name in names]) for step in metrics])
    rows = (sum_over_ranks(flat, world) / world.world_size).tolist()
    return [_unflatten(row, names, sizes, metrics[0]) for row in rows]


def _unflatten(row: list[float], names: list[str], sizes: list[int], like: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    start = 0
    for name, size in zip(names, sizes, strict=True):
        values[name] = row[start] if like[name].ndim == 0 else row[start : start + size]
        start += size
    return values


def speed_of(images: int, tokens_per_image: int, seconds: float, waited: float) -> dict[str, float]:
    """Return the rates of a window of steps that took `seconds`, of which this rank waited `waited` for data."""
    return {
        "images_per_second": images / seconds,
        "tokens_per_second": images * tokens_per_image / seconds,
        "data_wait_share": waited / seconds,
    }


def progress_line(record: Record, *, total_steps: int, global_batch: int, headline: str) -> str:
    """Write a training record as one line for people; `headline` is the part that only its stage knows."""
    step = record["step"]
    eta = (total_steps - step) * global_batch / record["images_per_second"]
    return (
        f"step {step}/{total_steps} {step / total_steps:.1%} | epoch {record['epoch']:.2f} | {headline} | "
        f"lr {record['learning_rate']:.1e} | gnorm {record['gradient_norm']:.2f} | "
        f"{record['images_per_second']:.1f} img/s {record['tokens_per_second']:.0f} tok/s | "
        f"data {record['data_wait_share']:.0%} | eta {format_duration(eta)}"
    )


def format_duration(seconds: float) -> str:
    """Write seconds as 1h02m, 3m20s or 12s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def name_some(names: list[str], most: int = 8) -> str:
    """Write the first names of a list, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"samples {', '.join(names[:most])}{rest}"
