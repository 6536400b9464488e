"""What a block is said to keep for its backward pass is what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.attention import BlockCausalAttention
from models.var import VARConfig, make_block
from training.activations import kept_by_block, products_of_block, recomputed_by_block, saved_by_block
from training.engine import EngineConfig

IMAGES = 3


def saved_bytes(config: VARConfig, engine: EngineConfig) -> int:
    """Bytes of the storages that autograd keeps of one block, parameters aside."""
    block = make_block(config).to(engine.dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(IMAGES, config.scales.num_tokens, config.width).to(engine.dtype).requires_grad_()
    condition = torch.randn(IMAGES, config.width).to(engine.dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x, condition, attend=BlockCausalAttention(config.scales, engine.attention))
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["adaln", "layer_norm"])
def test_a_block_keeps_what_is_said(norm: str, precision: str) -> None:
    config = VARConfig(depth=4, patch_nums=(1, 2, 3, 4, 5, 6), norm=norm)
    engine = EngineConfig(precision=precision)
    said = IMAGES * sum(saved_by_block(config, engine).values())
    assert saved_bytes(config, engine) == pytest.approx(said, rel=0.05)


def test_each_way_of_checkpointing_keeps_less_and_recomputes_the_rest() -> None:
    config = VARConfig(depth=16)
    kept = {}
    for way in ("none", "selective", "full"):
        engine = EngineConfig(activation_checkpointing=way)
        kept[way] = kept_by_block(config, engine)
        assert kept[way] + recomputed_by_block(config, engine) == sum(saved_by_block(config, engine).values())
    assert kept["none"] > kept["selective"] > kept["full"]
    assert kept["selective"] == kept["full"] + products_of_block(config, EngineConfig())
