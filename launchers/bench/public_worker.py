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
from typing import Any

LEARNING_RATE, WEIGHT_DECAY, CLIPPING = 1e-5, 0.05, 2.0
AMP_MODES = {"fp32": 0, "fp16": 1, "bf16": 2}  # AmpOptimizer's numbers


class PublicModels:
    """Both public models with the weights they were given, and the calls that are timed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from utils.amp_sc import AmpOptimizer

        from models import build_vae_var

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = settings["precision"]
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
        self.load(settings["folder"])
        self.var.requires_grad_(True).train()
        self.parameters = list(self.var.parameters())
        self.names = [name for name, _ in self.var.named_parameters()]
        self.settings = settings
        self.inputs: dict[tuple[str, int], Any] = {}
        self.amp_optimizer = AmpOptimizer
        self.optimizer: Any = None

    def load(self, folder: str) -> None:
        for model, name in ((self.tokenizer, "tokenizer.pth"), (self.var, "var.pth")):
            model.load_state_dict(self.torch.load(os.path.join(folder, name), map_location="cpu", weights_only=True))

    def train_step(self, batch: int, *, encodes: bool) -> None:
        """One step on random images, or on their codes where `encodes` is false."""
        if self.optimizer is None:
            adamw = self.torch.optim.AdamW(
                self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
            )
            mode = AMP_MODES[self.precision]
            self.optimizer = self.amp_optimizer(mode, adamw, self.names, self.parameters, CLIPPING)
        self.var.train()
        maps = self.tokenizer.img_to_idxBl(self.images(batch)) if encodes else self.token_maps(batch)
        codes = self.torch.cat(maps, dim=1)
        inputs = self.tokenizer.quantize.idxBl_to_var_input(maps)
        with self.autocast():  # AmpOptimizer's own is CUDA's alone, and equal to this one there
            logits = self.var(self.labels(batch), inputs)
            scored = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none")
            loss = scored.view(batch, -1).mul(1 / codes.shape[1]).sum(dim=-1).mean()
        self.optimizer.backward_clip_step(stepping=True, loss=loss)
        logits.data.argmax(dim=-1)  # the public step does it in every step

    def sample(self, batch: int, *, cfg: float, top_k: int, top_p: float) -> None:
        """Images from labels, as the public demo draws them."""
        self.var.eval()
        with self.torch.inference_mode(), self.autocast():
            labels = self.labels(batch)
            self.var.autoregressive_infer_cfg(B=batch, label_B=labels, cfg=cfg, top_k=top_k, top_p=top_p, g_seed=0)

    def encode(self, batch: int) -> None:
        with self.torch.inference_mode():
            self.tokenizer.img_to_idxBl(self.images(batch))

    def decode(self, batch: int) -> None:
        with self.torch.inference_mode():
            self.tokenizer.idxBl_to_img(self.token_maps(batch), same_shape=True, last_one=True)

    def release(self) -> None:
        self.torch.cuda.empty_cache()

    def autocast(self) -> Any:
        torch = self.torch
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = dtypes.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype=dtype)

    def labels(self, batch: int) -> Any:
        return self.resident("labels", batch, lambda: self.torch.arange(batch) % self.settings["num_classes"])

    def images(self, batch: int) -> Any:
        side = 16 * self.settings["patch_nums"][-1]
        generator = self.torch.Generator().manual_seed(0)
        return self.resident(
            "images", batch, lambda: self.torch.rand(batch, 3, side, side, generator=generator) * 2 - 1
        )

    def token_maps(self, batch: int) -> list[Any]:
        sizes = [side * side for side in self.settings["patch_nums"]]
        shape, generator = (batch, sum(sizes)), self.torch.Generator().manual_seed(0)
        codes = self.resident(
            "codes", batch, lambda: self.torch.randint(self.settings["vocab_size"], shape, generator=generator)
        )
        return list(codes.split(sizes, dim=1))

    def resident(self, kind: str, batch: int, make: Callable[[], Any]) -> Any:
        """Inputs made by the first call that needs them, which warms up; later ones find them on the device, like ours.

        Outside inference mode: training keeps them for its backward pass.
        """
        if (kind, batch) not in self.inputs:
            with self.torch.inference_mode(False):
                self.inputs[kind, batch] = make().to(self.device)
        return self.inputs[kind, batch]


def serve(answer: Callable[[dict[str, Any]], None]) -> None:
    """Build the models as the first line says, then do what each further line asks for."""
    settings = json.loads(sys.stdin.readline())
    sys.path[0] = settings["checkout"]
    models = PublicModels(settings)
    torch = models.torch
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


def serve_on_a_pipe() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the public code prints

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    serve(answer)


if __name__ == "__main__":
    serve_on_a_pipe()
