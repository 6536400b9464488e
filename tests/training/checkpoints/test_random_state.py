"""A process that goes on from a random state draws what the other one would have drawn."""

from __future__ import annotations

import random

import numpy as np
import torch

from training.checkpoints.random_state import random_state, set_random_state

CPU = torch.device("cpu")


def draws() -> tuple[list[float], list[float], list[float]]:
    """Normal numbers, which Python and numpy draw in pairs and keep one of."""
    return [random.gauss(0, 1) for _ in range(3)], np.random.randn(3).tolist(), torch.randn(3).tolist()


def test_all_generators_go_on_where_they_stopped() -> None:
    for _ in range(2):  # with a kept normal number and without
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
        state = random_state(CPU)
        expected = draws()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        assert draws() != expected
        set_random_state(state, CPU)
        assert draws() == expected


def test_the_state_is_tensors_alone() -> None:
    """So that it can be stored without pickle."""
    assert all(isinstance(value, torch.Tensor) for value in random_state(CPU).values())
