"""What all tests share."""

from __future__ import annotations

import pytest
import torch
from tiny import Study, make_study


def pytest_configure() -> None:
    """One thread: these tensors are too small to share, and threads that wait for a busy core cost tenfold."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Tests that train in it choose a run folder of their own."""
    return make_study(tmp_path_factory.mktemp("study"))
