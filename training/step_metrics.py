"""From tensors on every rank to numbers in the record: the reduction, the time spent waiting, lines for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from training.engine.distributed import World, sum_over_ranks


class TimedIterator:
    """Passes items through, says so before it waits, and adds up the seconds spent waiting."""

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
        """Seconds waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Stop what reads ahead, if anything does."""
        if hasattr(self._items, "close"):
            self._items.close()


def mean_over_ranks(metrics: list[dict[str, Tensor]], world: World) -> list[dict[str, Any]]:
    """Average equally named scalars and vectors over the ranks; one reduction and one copy to the host for all."""
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
    """The rates of a window of steps that took `seconds`, of which this rank waited `waited` for data."""
    return {
        "images_per_second": images / seconds,
        "tokens_per_second": images * tokens_per_image / seconds,
        "data_wait_share": waited / seconds,
    }


def progress_line(record: dict[str, Any], total: int, global_batch: int, headline: str) -> str:
    """A training record in one line for people; `headline` is what only its stage knows."""
    step = record["step"]
    eta = (total - step) * global_batch / record["images_per_second"]
    return (
        f"step {step}/{total} {step / total:.1%} | epoch {record['epoch']:.2f} | {headline} | "
        f"lr {record['learning_rate']:.1e} | gnorm {record['gradient_norm']:.2f} | "
        f"{record['images_per_second']:.1f} img/s {record['tokens_per_second']:.0f} tok/s | "
        f"data {record['data_wait_share']:.0%} | eta {format_duration(eta)}"
    )


def format_duration(seconds: float) -> str:
    """1h02m, 3m20s or 12s."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def name_some(names: list[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"samples {', '.join(names[:most])}{rest}"
