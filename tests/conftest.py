"""What all tests share."""

from __future__ import annotations

import torch


def pytest_configure() -> None:
    """One thread: these tensors are too small to share, and threads that wait for a busy core cost tenfold."""
    torch.set_num_threads(1)
