"""The public code is found in a checkout, gets our weights, and does in its own process what it is told.

A stand-in with the public names answers here; the real one is measured by `benchmark.py train --against PATH`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer

from launchers.bench.public_code import PublicCall, PublicCode, check_checkout
from models.var import VAR, VARConfig

MODELS = """
import torch
print("printed by the public code")

class Part(torch.nn.Module):
    def __init__(self, entries):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.entries = entries
    def load_state_dict(self, state):
        assert self.entries in state, sorted(state)
    def autoregressive_infer_cfg(self, B, label_B, **settings):
        assert label_B.tolist() == [0, 1] and settings == dict(cfg=1.5, top_k=9, top_p=0.5, g_seed=0)
    def forward(self, labels, inputs):
        return self.weight.sum() * torch.ones(len(labels), 5, 16)
    def img_to_idxBl(self, images):
        assert images.shape == (2, 3, 32, 32)
        return [torch.zeros(2, 1).long(), torch.zeros(2, 4).long()]
    def idxBl_to_img(self, maps, same_shape, last_one):
        assert [m.shape[1] for m in maps] == [1, 4] and max(m.max() for m in maps) < 16
    @property
    def quantize(self):
        return self
    def idxBl_to_var_input(self, maps):
        return maps

def build_vae_var(device, patch_nums, V, Cvae, ch, num_classes, depth, shared_aln):
    assert (patch_nums, V, Cvae, ch, num_classes, depth, shared_aln) == ((1, 2), 16, 4, 32, 3, 1, False)
    return Part("quantize.embedding.weight"), Part("pos_start")
"""
OPTIMIZER = """
class AmpOptimizer:
    def __init__(self, mode, optimizer, names, paras, grad_clip):
        assert (mode, names, grad_clip) == (0, ["weight"], 2.0)
        self.optimizer = optimizer
    def backward_clip_step(self, stepping, loss):
        loss.backward()
        self.optimizer.step()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {"models/__init__.py": MODELS, "models/var.py": "", "models/vqvae.py": "", "models/quant.py": ""}
    for name, text in (files | {"utils/amp_sc.py": OPTIMIZER}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def public(checkout: Path) -> PublicCode:
    var = VAR(VARConfig(depth=1, patch_nums=(1, 2), vocab_size=16, code_width=4, num_classes=3))
    return PublicCode(str(checkout), var, make_tokenizer(), precision="fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in's tensors lie on the CPU")
def test_it_does_what_it_is_told(checkout: Path) -> None:
    with public(checkout) as running:
        assert running.timed("train_step", batch=2, encodes=True)() == 2
        assert running.timed("train_step", batch=2, encodes=False)() == 2
        assert running.timed("sample", batch=2, cfg=1.5, top_k=9, top_p=0.5)() == 2
        encode, decode = (running.timed(what, batch=2) for what in ("encode", "decode"))
        assert encode() == decode() == 2
        assert encode.memory() == {}


def test_each_kind_of_work_knows_the_memory_of_its_latest_call() -> None:
    sizes = iter([5, 9, 7])
    small, large = (PublicCall(lambda: {"peak_bytes": next(sizes)}, batch, release=list) for batch in (1, 2))
    assert (small(), large(), small()) == (1, 2, 1)
    assert (small.memory(), large.memory()) == ({"peak_bytes": 7}, {"peak_bytes": 9})


def test_what_cannot_start_leaves_nothing_open(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "models/__init__.py").write_text("import a_package_that_nobody_has")
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **more: started.append(start(*given, **more)) or started[0])
    running = public(checkout)
    with pytest.raises(ValueError, match="a_package_that_nobody_has"):
        running.__enter__()
    process, folder = started[0], Path(running._settings["folder"])
    assert process.stdin.closed and process.stdout.closed and process.returncode is not None and not folder.exists()


def test_what_it_said_last_is_the_error(checkout: Path) -> None:
    (checkout / "models/__init__.py").write_text("import a_package_that_nobody_has")
    with pytest.raises(ValueError, match="a_package_that_nobody_has.*requirements.txt"), public(checkout):
        pass


def test_a_folder_without_the_public_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="models/var.py; give the folder of a clone"):
        check_checkout(str(tmp_path))
