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


def saved_bytes(config: VARConfig, engine: EngineConfig) -> int:
    """Bytes of the storages that autograd keeps of one block, parameters aside."""
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


MODELS = pytest.mark.parametrize("norm, qk_norm", list(product(("adaln", "layer_norm"), (True, False))))
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])
ATTENTIONS = pytest.mark.parametrize("attention", [PER_SCALE, MASKED])


def config_of(**changes: Any) -> VARConfig:
    return VARConfig(depth=4, patch_nums=(1, 2, 3, 4, 5, 6), **changes)


def said_bytes(config: VARConfig, engine: EngineConfig) -> int:
    return IMAGES * sum(saved_by_block(config, engine).values())


@MODELS
@PRECISIONS
@ATTENTIONS
def test_a_block_keeps_what_is_said(attention: str, precision: str, norm: str, qk_norm: bool) -> None:
    config, engine = config_of(norm=norm, qk_norm=qk_norm), EngineConfig(precision=precision, attention=attention)
    assert saved_bytes(config, engine) == pytest.approx(said_bytes(config, engine), rel=0.01)


def test_so_does_a_compiled_one_as_runs_on_gpus_have_it() -> None:
    engine = EngineConfig(precision="bf16", compile=True)
    assert saved_bytes(config_of(), engine) == pytest.approx(said_bytes(config_of(), engine), rel=0.01)


@pytest.mark.slow  # to compile them takes a minute
@MODELS
@PRECISIONS
@ATTENTIONS
def test_so_do_all_compiled_ones(attention: str, precision: str, norm: str, qk_norm: bool) -> None:
    config = config_of(norm=norm, qk_norm=qk_norm)
    engine = EngineConfig(precision=precision, attention=attention, compile=True)
    assert saved_bytes(config, engine) == pytest.approx(said_bytes(config, engine), rel=0.07)


def test_each_way_of_checkpointing_keeps_less_and_recomputes_the_rest() -> None:
    config = VARConfig(depth=16)
    kept = {}
    for way in ("none", "selective", "full"):
        engine = EngineConfig(activation_checkpointing=way)
        kept[way] = kept_by_block(config, engine)
        assert kept[way] + recomputed_by_block(config, engine) == sum(saved_by_block(config, engine).values())
    assert kept["none"] > kept["selective"] > kept["full"]
    assert kept["selective"] == kept["full"] + products_of_block(config, EngineConfig())


def test_the_result_of_flex_is_not_kept_by_selective_checkpointing() -> None:
    per_scale, flex = (products_of_block(config_of(), EngineConfig(attention=way)) for way in (PER_SCALE, FLEX))
    config = config_of()
    assert per_scale - flex == config.scales.num_tokens * (2 * config.width + 4 * config.num_heads)
