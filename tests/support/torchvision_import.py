"""Importing torchvision beside any build of torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # a library that is collected takes its operators with it


def import_torchvision() -> ModuleType:
    """Import torchvision, even where its wheel was built for another torch (then without its compiled operators).

    torchvision registers fakes for two operators that only its binary defines; declaring them lets the import succeed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        assert "torchvision::nms" in str(error)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")
