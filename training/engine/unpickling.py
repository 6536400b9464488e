"""The switch that keeps every `torch.load` of the process, DeepSpeed's too, from unpickling objects."""

from __future__ import annotations

import os


def forbid_unpickling() -> None:
    """Keep every later `torch.load` in this process and its children from unpickling objects."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
