"""The models and batches that several benchmarks share. Weights are random: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import CodeDataset
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.members import Sample
from data_pipeline.shards.writer import write_shards
from launchers.bench.config import BenchmarkConfig
from launchers.bench.public_code import PublicCode
from launchers.bench.timing import device_type
from models.autoencoder import AutoencoderConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

import numpy as np
import torch
from torch import Tensor

WEIGHT_STD = 0.02  # about that of the initial weights


def var_config(config: BenchmarkConfig) -> VARConfig:
    """Return the transformer's config."""
    return VARConfig(depth=config.depth, patch_nums=config.patch_nums)


def make_var(config: BenchmarkConfig) -> VAR:
    """Make a transformer on the device. Drawing it there saves the half minute that the recipe's draw takes at d30."""
    with torch.device("meta"):
        var = VAR(var_config(config))
    var.to_empty(device=device_type())
    generator = torch.Generator(device_type()).manual_seed(0)
    with torch.no_grad():
        for parameter in var.parameters():
            parameter.normal_(std=WEIGHT_STD, generator=generator)
    return var


def make_tokenizer(config: BenchmarkConfig) -> VQVAE:
    """Make a frozen tokenizer with the released one's sizes, but for the width that the config gives."""
    autoencoder = AutoencoderConfig(width=config.tokenizer_width)
    torch.manual_seed(0)
    return VQVAE(VQVAEConfig(patch_nums=config.patch_nums, autoencoder=autoencoder)).eval().requires_grad_(False)


def code_batch(config: VARConfig, batch: int) -> Batch:
    """Return random codes (B, L) with the labels 0, 1, 2, ..."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.vocab_size, (batch, config.scales.num_tokens), generator=generator)
    return _batch(codes, config)


def image_batch(config: VARConfig, tokenizer: VQVAEConfig, batch: int) -> Batch:
    """Return random pixels (B, 3, H, H) in [-1, 1] with the labels 0, 1, 2, ..."""
    side = tokenizer.image_size
    pixels = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return _batch(pixels, config)


def _batch(data: Tensor, config: VARConfig) -> Batch:
    numbers = torch.arange(len(data))
    return Batch(data, numbers % config.num_classes, numbers, torch.ones(len(data)))


def make_codes(folder: Path, config: VARConfig, *, samples: int, views: int = 1, shards: int = 2) -> CodeDataset:
    """Write random codes to shards as `encode_codes` does, and open them."""
    length, vocab, classes = config.scales.num_tokens, config.vocab_size, config.num_classes
    generator, layout = np.random.default_rng(0), CodeFormat.for_vocab(length, vocab, views)
    drawn = (generator.integers(0, vocab, (views, length)) for _ in range(samples))
    stored = (
        Sample(f"{number:09d}", {layout.suffix: layout.pack(number % classes, codes)})
        for number, codes in enumerate(drawn)
    )
    meta = {"patch_nums": list(config.patch_nums), "vocab_size": vocab, "num_tokens": length, "bits": layout.bits}
    meta |= {"views": views, "tokenizer_sha256": "0" * 64, "classes": [str(label) for label in range(classes)]}
    write_shards(stored, folder, kind="codes", meta=meta, samples_per_shard=-(-samples // shards))
    return CodeDataset(folder, patch_nums=config.patch_nums, vocab_size=vocab, tokenizer_sha256=None)


@contextmanager
def public_code(config: BenchmarkConfig, var: VAR, tokenizer: VQVAE) -> Iterator[PublicCode | None]:
    """Start the public code with the same weights, where the config names a checkout of it; else give None."""
    if not config.against:
        yield None
        return
    with PublicCode(config.against, var, tokenizer, precision=config.precision) as public:
        yield public
