"""The state of the process-wide random generators of Python, numpy and torch, as plain tensors.

Training itself draws nothing from them: its draws are functions of the seed and `samples_seen`. They are kept so that
whatever else in a process uses them, a library or a user's own loss, goes on where it stopped too.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of all generators, name -> tensor on the CPU; CUDA's too if `device` is a GPU."""
    _, words, normal = random.getstate()
    _, keys, position, has_normal, cached = np.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_normal": torch.tensor([] if normal is None else [normal], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_normal], dtype=torch.int64),
        "numpy_normal": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators to a state that `random_state` returned; CUDA's only where both sides have a GPU."""
    normal = state["python_normal"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), normal[0] if normal else None))
    position, has_normal = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_normal, float(state["numpy_normal"])))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
