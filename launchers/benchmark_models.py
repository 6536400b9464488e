"""The models and batches that several benchmarks share. Weights are initial ones: speed does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.codes import CodeFormat
from data_pipeline.datasets import CodeDataset
from data_pipeline.loader import Batch
from data_pipeline.members import Sample
from data_pipeline.shards import write_shards
from launchers.benchmark_config import BenchmarkConfig
from launchers.public_code import PublicCode
from models.autoencoder import AutoencoderConfig
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig


def var_config(config: BenchmarkConfig) -> VARConfig:
    return VARConfig(depth=config.depth, patch_nums=config.patch_nums)


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
    """Random codes, packed as `encode_codes` does it."""
    layout = CodeFormat.for_vocab(config.scales.num_tokens, config.vocab_size, views=1)
    generator = np.random.default_rng(0)
    sizes = {"patch_nums": list(config.patch_nums), "vocab_size": config.vocab_size}
    meta = sizes | {"classes": [str(label) for label in range(config.num_classes)], "bits": layout.bits, "views": 1}
    meta |= {"num_tokens": config.scales.num_tokens, "tokenizer_sha256": "0" * 64}
    records = (
        layout.pack(number % config.num_classes, generator.integers(0, config.vocab_size, (1, layout.num_tokens)))
        for number in range(samples)
    )
    named = (Sample(f"{number:09d}", {layout.suffix: record}) for number, record in enumerate(records))
    write_shards(named, folder, kind="codes", meta=meta, samples_per_shard=samples)
    return CodeDataset(folder, **sizes, tokenizer_sha256=None)


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
