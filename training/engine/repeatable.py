"""Computing on images so that the numbers depend neither on the batch nor on the cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def map_alone(function: Callable[[Tensor], Result], images: Tensor) -> list[Result]:
    """Apply a function to images (N, ...), on a CPU to each alone, by one thread; on a GPU to all at once.

    A CPU rounds products differently in a batch of another size, or split over other threads. The images share the
    cores instead. Results come in the order of the images.
    """
    if images.device.type != "cpu":
        return [function(images)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as workers:
            return list(workers.map(function, images.split(1)))
    finally:
        torch.set_num_threads(threads)
