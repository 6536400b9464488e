"""The worker that drives the public code must not import anything of ours: its packages have the names of ours."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import models
from launchers.bench import public_worker
from launchers.bench.public_worker import PublicModels


def test_it_imports_the_standard_library_torch_and_the_public_code_alone() -> None:
    tree = ast.parse(Path(public_worker.__file__).read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in found if name.split(".")[0] not in sys.stdlib_module_names} == {
        "torch",
        "models",
        "utils.amp_sc",
    }
    at_the_top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(node.module == "models" for node in at_the_top if isinstance(node, ast.ImportFrom))


class Part(torch.nn.Module):
    """Either of the public models: remembers what it is given, and whether products would be in low precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.given: list[Any] = []
        self.precisions: list[torch.dtype | None] = []

    @property
    def quantize(self) -> Part:
        return self

    def forward(self, labels: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        self.precisions.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        self.given.append(labels)
        return self.weight * torch.ones(len(labels), 5, 16)

    def img_to_idxBl(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.given.append(images)
        return [images.new_zeros(len(images), number, dtype=torch.int64) for number in (1, 4)]

    def idxBl_to_img(self, maps: list[torch.Tensor], **settings: Any) -> None:
        self.given.append(maps[0])

    def idxBl_to_var_input(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return maps[0]


class AmpOptimizer:
    def __init__(self, mode: int, optimizer: Any, *others: Any) -> None:
        self.amp_ctx = torch.autocast("cuda", enabled=False)  # as the public one on a machine without CUDA

    def backward_clip_step(self, stepping: bool, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the worker's models around two stand-ins of the public ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "utils", ModuleType("utils"))
    monkeypatch.setitem(sys.modules, "utils.amp_sc", ModuleType("utils.amp_sc"))
    sys.modules["utils.amp_sc"].AmpOptimizer = AmpOptimizer
    monkeypatch.setattr(models, "build_vae_var", lambda **settings: (Part(), Part()), raising=False)
    monkeypatch.setattr(PublicModels, "load", lambda self, folder: None)
    sizes = {"vocab_size": 16, "code_width": 4, "tokenizer_width": 32, "num_classes": 3, "depth": 1}
    settings = sizes | {"patch_nums": [1, 2], "shared_adaln": False, "folder": ""}
    return lambda precision: PublicModels(settings | {"precision": precision})


def test_inputs_are_made_once_for_each_batch_and_serve_training_after_inference(workers: Any) -> None:
    worker = workers("fp32")
    worker.encode(2)
    worker.decode(2)
    for _ in range(2):
        worker.train_step(2, encodes=True)
        worker.train_step(2, encodes=False)
    worker.encode(3)
    images = worker.tokenizer.given
    assert images[0] is images[2] is images[3] and [len(each) for each in images] == [2, 2, 2, 2, 3]  # [1]: codes
    assert len({id(labels) for labels in worker.var.given}) == 1 and worker.var.given[0].tolist() == [0, 1]
    assert not any(each.is_inference() for each in worker.inputs.values())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", None), ("bf16", torch.bfloat16)])
def test_a_step_is_in_the_precision_asked_for_on_a_cpu_too(workers: Any, precision: str, dtype: Any) -> None:
    worker = workers(precision)
    worker.train_step(2, encodes=False)
    assert worker.var.precisions == [dtype]
