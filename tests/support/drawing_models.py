"""A transformer and a tokenizer small enough to draw with, whose choices are not close."""

from __future__ import annotations

import torch
from torch import Tensor

from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

CONFIG = VARConfig(depth=2, patch_nums=(1, 2, 4), vocab_size=24, code_width=4, num_classes=5)
SAMPLING = {"cfg": 2.0, "top_k": 12, "top_p": 0.9}
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def decided_var(config: VARConfig = CONFIG) -> VAR:
    """Weights large enough for logits to differ between tokens and classes."""
    var, generator = VAR(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return var


def spread_tokenizer() -> VQVAE:
    """Codes far apart, of pictures of 8 x 8 pixels."""
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(width=32, multipliers=(1, 1), num_res_blocks=1, code_width=4)
    tokenizer = VQVAE(VQVAEConfig(CONFIG.patch_nums, autoencoder, QuantizerConfig(vocab_size=24, code_width=4)))
    tokenizer.quantizer.codebook.data.normal_()
    return tokenizer


def make_images() -> Tensor:
    return torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
