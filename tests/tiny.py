"""The smallest models, batches and engine on which the loops of both stages can be driven in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.var import VARConfig
from models.vqvae import VQVAE, VQVAEConfig
from training.engine import EngineConfig

PATCH_NUMS = (1, 2)  # 5 tokens
VAR_CONFIG = VARConfig(depth=1, patch_nums=PATCH_NUMS, vocab_size=16, code_width=4, num_classes=3)
VQVAE_CONFIG = VQVAEConfig(
    patch_nums=PATCH_NUMS,
    autoencoder=AutoencoderConfig(width=32, multipliers=(1, 1, 1), num_res_blocks=1, code_width=4),
    quantizer=QuantizerConfig(vocab_size=16, code_width=4, num_phi=0),
)


def make_tokenizer(seed: int = 0) -> VQVAE:
    """A tokenizer of 8 x 8 pixels whose codes lie far apart, so that many of them are used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = VQVAE(VQVAE_CONFIG)
        tokenizer.quantizer.codebook.data.normal_(0, 0.3)
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """What the loops read of a loader's batch."""

    data: Tensor
    labels: Tensor
    positions: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        return self

    def rows(self, part: slice) -> Batch:
        return Batch(self.data[part], self.labels[part], self.positions[part], self.weights[part])

    def with_weights(self, *weights: float) -> Batch:
        return replace(self, weights=torch.tensor(weights))


def code_batch(number: int, first_position: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first_position)
    codes = torch.randint(VAR_CONFIG.vocab_size, (number, VAR_CONFIG.scales.num_tokens), generator=generator)
    labels = torch.arange(number) % VAR_CONFIG.num_classes
    return Batch(codes, labels, first_position + torch.arange(number), torch.ones(number))


def image_batch(number: int, seed: int = 0) -> Batch:
    side = VQVAE_CONFIG.image_size
    images = torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Batch(images, torch.zeros(number, dtype=torch.int64), torch.arange(number), torch.ones(number))


class PlainEngine:
    """`training.engine.Engine` without DeepSpeed: a module, plain SGD, and an accumulation counter."""

    def __init__(self, model: nn.Module, *, accumulation: int = 1) -> None:
        self.model = model
        self.accumulation = accumulation
        self.config = EngineConfig(zero_stage=0, precision="fp32")
        self.updates = 0
        self._micro_steps = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, *, learning_rate: float, weight_decay: float) -> Tensor:
        self._micro_steps += 1
        if self._micro_steps % self.accumulation:
            return torch.tensor(0.0)
        self.updates += 1
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        with torch.no_grad():
            for parameter in parameters:
                parameter -= learning_rate * (parameter.grad + weight_decay * parameter)
        self.model.zero_grad()
        return norm

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def set_full_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def full_state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        torch.save(self.model.state_dict(), folder / tag / "shard-0.pt")

    def load(self, folder: Path, tag: str) -> None:
        self.model.load_state_dict(torch.load(folder / tag / "shard-0.pt", weights_only=True))
