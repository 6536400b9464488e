"""A checkout that looks like the public code to `benchmark.py --against`: its names check what they are given."""

from __future__ import annotations

from pathlib import Path

MODELS = '''
import torch
print("printed by the public code")

class Part(torch.nn.Module):
    """Either public model: checks what it is given, and counts the sets of inputs that are made for it."""

    def __init__(self, sizes, entries):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.sizes, self.entries, self.given = sizes, entries, {}

    def load_state_dict(self, state):
        assert self.entries in state, sorted(state)

    def seen(self, kind, given):
        assert not given.is_inference(), kind  # training keeps it for its backward pass
        assert self.given.setdefault((kind, len(given)), given) is given, "made anew for each call"

    def autoregressive_infer_cfg(self, B, label_B, **settings):
        assert label_B.tolist() == list(range(B)) and not self.training
        assert settings == dict(cfg=1.5, top_k=900, top_p=0.96, g_seed=0), settings

    def forward(self, labels, inputs):
        self.seen("labels", labels)
        assert self.training
        vocab, tokens = self.sizes["V"], sum(side**2 for side in self.sizes["patch_nums"])
        assert torch.is_autocast_enabled("cpu") == (self.sizes["precision"] == "bf16")
        return self.weight.sum() * torch.ones(len(labels), tokens, vocab)

    def img_to_idxBl(self, images):
        self.seen("images", images)
        assert images.shape[1:] == (3, *2 * [16 * self.sizes["patch_nums"][-1]]) and images.min() < -0.9
        return [torch.zeros(len(images), side**2).long() for side in self.sizes["patch_nums"]]

    def idxBl_to_img(self, maps, same_shape, last_one):
        assert [m.shape[1] for m in maps] == [side**2 for side in self.sizes["patch_nums"]]
        assert max(m.max() for m in maps) < self.sizes["V"]

    @property
    def quantize(self):
        return self

    def idxBl_to_var_input(self, maps):
        return maps

def build_vae_var(device, patch_nums, V, Cvae, ch, num_classes, depth, shared_aln):
    assert torch.get_num_threads() == @THREADS@, torch.get_num_threads()
    assert (Cvae, ch, num_classes, depth, shared_aln) == (32, 32, 1000, 1, False)
    sizes = dict(patch_nums=patch_nums, V=V, precision="@PRECISION@")
    return Part(sizes, "quantize.embedding.weight"), Part(sizes, "pos_start")
'''
OPTIMIZER = """
class AmpOptimizer:
    def __init__(self, mode, optimizer, names, paras, grad_clip):
        assert (names, len(paras), grad_clip) == (["weight"], 1, 2.0)
        assert mode == {"fp32": 0, "bf16": 2}["@PRECISION@"]
        self.optimizer = optimizer

    def backward_clip_step(self, stepping, loss):
        loss.backward()
        self.optimizer.step()
"""


def write_checkout(folder: Path, *, threads: int, precision: str = "fp32") -> Path:
    """Write the stand-in, which fails where it is not given so many threads and this precision."""
    files = {"models/__init__.py": MODELS, "utils/amp_sc.py": OPTIMIZER}
    for name, text in (files | dict.fromkeys(("models/var.py", "models/vqvae.py", "models/quant.py"), "")).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("@THREADS@", str(threads)).replace("@PRECISION@", precision))
    return folder
