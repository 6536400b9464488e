"""The public VAR code at work, in a process of its own: `public_code.PublicCode` starts it and tells it what to do.

Its packages are called `models` and `utils` like ours, so nothing of ours may be imported here: the checkout comes
first on the path, and requests and answers are lines of JSON. A training step is the public trainer's, put together
from the public parts: frozen tokenizer outside autocast, model, AmpOptimizer with the recipe's clipping, fused AdamW.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LEARNING_RATE, WEIGHT_DECAY, CLIPPING = 1e-5, 0.05, 2.0
AMP_MODES = {"fp32": 0, "fp16": 1, "bf16": 2}  # AmpOptimizer's numbers
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PublicModels:
    """Both public models with the weights they were given, and the kinds of work that are timed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from models import build_vae_var

        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer, self.var = build_vae_var(
            device=self.device,
            patch_nums=tuple(settings["patch_nums"]),
            V=settings["vocab_size"],
            Cvae=settings["code_width"],
            ch=settings["tokenizer_width"],
            num_classes=settings["num_classes"],
            depth=settings["depth"],
            shared_aln=settings["shared_adaln"],
        )
        for model, name in ((self.tokenizer, "tokenizer.pth"), (self.var, "var.pth")):
            path = os.path.join(settings["folder"], name)
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.var.requires_grad_(True).train()
        self.inputs: dict[tuple[str, int], Tensor] = {}

    @cached_property
    def optimizer(self) -> Any:
        from utils.amp_sc import AmpOptimizer

        names, parameters = zip(*self.var.named_parameters())
        adamw = torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )
        return AmpOptimizer(AMP_MODES[self.settings["precision"]], adamw, list(names), list(parameters), CLIPPING)

    def train_step(self, batch: int, *, encodes: bool) -> None:
        """Take one step on random images, or on their codes where `encodes` is false."""
        self.var.train()
        maps = self.tokenizer.img_to_idxBl(self.images(batch)) if encodes else self.token_maps(batch)
        codes = torch.cat(maps, dim=1)
        inputs = self.tokenizer.quantize.idxBl_to_var_input(maps)
        with self.autocast():  # AmpOptimizer's own is for CUDA alone, and equal to this one there
            logits = self.var(self.labels(batch), inputs)
            scored = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
            loss = scored.view(batch, -1).mul(1 / codes.shape[1]).sum(dim=-1).mean()
        self.optimizer.backward_clip_step(stepping=True, loss=loss)
        logits.data.argmax(dim=-1)  # the public trainer does it in every step

    def sample(self, batch: int, *, cfg: float, top_k: int, top_p: float) -> None:
        """Draw images from labels, as the public demo does."""
        self.var.eval()
        with torch.inference_mode(), self.autocast():
            labels = self.labels(batch)
            self.var.autoregressive_infer_cfg(B=batch, label_B=labels, cfg=cfg, top_k=top_k, top_p=top_p, g_seed=0)

    @torch.inference_mode()
    def encode(self, batch: int) -> None:
        """Turn images into codes."""
        self.tokenizer.img_to_idxBl(self.images(batch))

    @torch.inference_mode()
    def decode(self, batch: int) -> None:
        """Turn codes into images."""
        self.tokenizer.idxBl_to_img(self.token_maps(batch), same_shape=True, last_one=True)

    def release(self) -> None:
        """Give back the GPU memory that is kept for later calls."""
        torch.cuda.empty_cache()

    def autocast(self) -> Any:
        """Return the context in which the public code computes in low precision."""
        dtype = DTYPES.get(self.settings["precision"])
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype=dtype)

    def labels(self, batch: int) -> Tensor:
        """Return the labels 0, 1, 2, ... (B,)."""
        return self.resident("labels", batch, lambda _: torch.arange(batch) % self.settings["num_classes"])

    def images(self, batch: int) -> Tensor:
        """Return random pixels (B, 3, H, H) in [-1, 1]."""
        shape = (batch, 3, *2 * [16 * self.settings["patch_nums"][-1]])
        return self.resident("images", batch, lambda generator: torch.rand(shape, generator=generator) * 2 - 1)

    def token_maps(self, batch: int) -> list[Tensor]:
        """Return random token maps, each (B, p_k^2)."""
        sizes, vocab = [side * side for side in self.settings["patch_nums"]], self.settings["vocab_size"]
        shape = (batch, sum(sizes))
        codes = self.resident("codes", batch, lambda generator: torch.randint(vocab, shape, generator=generator))
        return list(codes.split(sizes, dim=1))

    def resident(self, kind: str, batch: int, make: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return inputs that the first call makes, which warms up; later ones find them on the device, like ours.

        They are made outside inference mode, since training keeps them for its backward pass.
        """
        if (kind, batch) not in self.inputs:
            with torch.inference_mode(False):
                self.inputs[kind, batch] = make(torch.Generator().manual_seed(0)).to(self.device)
        return self.inputs[kind, batch]


def serve(answer: Callable[[dict[str, Any]], None]) -> None:
    """Build the models as the first line says, then do what each further line asks for."""
    settings = json.loads(sys.stdin.readline())
    sys.path[0] = settings["checkout"]
    torch.set_num_threads(settings["threads"])
    models = PublicModels(settings)
    if models.device == "cuda":  # as the public trainer sets them (its tf32, and seed_everything without a seed)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        work = getattr(models, request.pop("what"))
        if models.device != "cuda":
            work(**request)
            answer({})
            continue
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        work(**request)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        answer({"peak_bytes": peak, "working_bytes": peak - resident})


def main() -> None:
    """Serve on stdin and stdout, where the public code's own prints go to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(lambda value: print(json.dumps(value), file=answers, flush=True))


if __name__ == "__main__":
    main()
