"""What a block is said to keep for its backward pass is what autograd keeps."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import FLEX, MASKED, PER_SCALE, BlockCausalAttention
from models.var import VARConfig, make_block
from training.engine.engine import EngineConfig
from training.planning.activations import kept_by_block, products_of_block, recomputed_by_block, saved_by_block

IMAGES = 3
ALL = pytest.mark.parametrize(
    "norm, qk_norm, precision, attention",
    list(product(("adaln", "layer_norm"), (True, False), ("fp32", "bf16"), (PER_SCALE, MASKED))),
)


def saved_bytes(config: VARConfig, engine: EngineConfig) -> int:
    """The bytes of the storages that autograd keeps of one block, parameters aside."""
    block = make_block(config).to(engine.dtype)
    if engine.compile:
        torch.compiler.reset()
        block.forward = torch.compile(block.forward, dynamic=False)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(IMAGES, config.scales.num_tokens, config.width).to(engine.dtype).requires_grad_()
    condition = torch.randn(IMAGES, config.width).to(engine.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x, condition, attend=BlockCausalAttention(config.scales, engine.attention).on(x.device))
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def config_of(**changes: Any) -> VARConfig:
    return VARConfig(depth=4, patch_nums=(1, 2, 3, 4, 5, 6), **changes)


@ALL
def test_a_block_keeps_what_is_said(norm: str, qk_norm: bool, precision: str, attention: str) -> None:
    config, engine = config_of(norm=norm, qk_norm=qk_norm), EngineConfig(precision=precision, attention=attention)
    assert saved_bytes(config, engine) == pytest.approx(IMAGES * saved_by_block(config, engine), rel=0.01)


@pytest.mark.slow  # compilation takes a minute
@ALL
def test_a_compiled_block_keeps_what_is_said(norm: str, qk_norm: bool, precision: str, attention: str) -> None:
    config = config_of(norm=norm, qk_norm=qk_norm)
    engine = EngineConfig(precision=precision, attention=attention, compile=True)
    assert saved_bytes(config, engine) == pytest.approx(IMAGES * saved_by_block(config, engine), rel=0.07)


def test_checkpointing_keeps_less_and_recomputes_the_rest() -> None:
    config = VARConfig(depth=16)
    kept = {}
    for way in ("none", "selective", "full"):
        engine = EngineConfig(activation_checkpointing=way)
        kept[way] = kept_by_block(config, engine)
        assert kept[way] + recomputed_by_block(config, engine) == saved_by_block(config, engine)
    stream = 680 * 1024 * 2  # tokens, width, bytes of bf16
    assert kept["full"] == stream
    products = 3 + 1 + 4 + 1 + 1  # qkv, proj, fc1, fc2, attention, in streams
    assert kept["selective"] == (1 + products) * stream + 680 * 16 * 4 < kept["none"]  # log-sum-exp of 16 heads


def test_selective_checkpointing_does_not_keep_the_result_of_flex_attention() -> None:
    config = config_of()
    per_scale, flex = (products_of_block(config, EngineConfig(attention=way)) for way in (PER_SCALE, FLEX))
    assert per_scale - flex == config.scales.num_tokens * (2 * config.width + 4 * config.num_heads)
