"""The models and batches that several benchmarks share. Weights are random: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset
from launchers.bench.config import BenchmarkConfig
from launchers.bench.folders import made_codes
from launchers.bench.machine_limits import device_type
from launchers.bench.public_code import PublicCode
from models.autoencoder import AutoencoderConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

WEIGHT_STD = 0.02  # about that of the initial weights


def var_config(config: BenchmarkConfig) -> VARConfig:
    return VARConfig(depth=config.depth, patch_nums=config.patch_nums)


def make_var(config: BenchmarkConfig) -> VAR:
    """A transformer on the device, drawn there: the recipe's own draw, on one core, takes half a minute at d30."""
    with torch.device("meta"):
        var = VAR(var_config(config))
    var.to_empty(device=device_type())
    generator = torch.Generator(device_type()).manual_seed(0)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=WEIGHT_STD, generator=generator)
    return var


def make_tokenizer(config: BenchmarkConfig) -> VQVAE:
    """A frozen tokenizer with the released one's sizes, but for its width where the config says so."""
    autoencoder = AutoencoderConfig(width=config.tokenizer_width)
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(patch_nums=config.patch_nums, autoencoder=autoencoder)).eval().requires_grad_(False)


def code_batch(config: VARConfig, batch: int) -> Batch:
    """Random codes with the labels 0, 1, 2, ..."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.vocab_size, (batch, config.scales.num_tokens), generator=generator)
    return _batch(codes, config)


def code_shards(config: VARConfig, folder: Path, samples: int) -> CodeDataset:
    """Random codes from shards, one view of each sample."""
    made_codes(folder, config, views=1, samples=samples)
    return CodeDataset(folder, patch_nums=config.patch_nums, vocab_size=config.vocab_size, tokenizer_sha256=None)


def image_batch(config: VARConfig, tokenizer: VQVAEConfig, batch: int) -> Batch:
    """Random pixels with the labels 0, 1, 2, ..."""
    side = tokenizer.image_size
    pixels = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return _batch(pixels, config)


def _batch(data: Tensor, config: VARConfig) -> Batch:
    numbers = torch.arange(len(data))
    return Batch(data, numbers % config.num_classes, numbers, torch.ones(len(data)))


@contextmanager
def public_code(config: BenchmarkConfig, var: VAR, tokenizer: VQVAE) -> Iterator[PublicCode | None]:
    """The public code with the same weights, where the config names a checkout of it."""
    if not config.against:
        yield None
        return
    with PublicCode(config.against, var, tokenizer, precision=config.precision) as public:
        yield public
