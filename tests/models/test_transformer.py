"""The parts of the transformer."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.transformer import (
    AdaLNBlock,
    KVCache,
    LayerNormBlock,
    Modulation,
    SelfAttention,
    SharedModulation,
    UnitNorm,
    modulate,
)

WIDTH, HEADS, BATCH, TOKENS = 32, 2, 3, 5


def make_block(kind: str = "adaln") -> AdaLNBlock | LayerNormBlock:
    if kind == "layer_norm":
        return LayerNormBlock(WIDTH, HEADS, hidden_width=64, qk_norm=True)
    return AdaLNBlock(WIDTH, HEADS, hidden_width=64, qk_norm=True, shared_adaln=False)


def branches_of(block: AdaLNBlock | LayerNormBlock, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    """What attention and feed-forward would each add to x, if they were alone."""
    if isinstance(block, LayerNormBlock):
        return block.attention(block.attention_norm(x)), block.feed_forward(block.feed_forward_norm(x))
    m = block.modulation(condition)
    attended = block.attention(modulate(x, m.attention_scale, m.attention_shift))
    fed = block.feed_forward(modulate(x, m.feed_forward_scale, m.feed_forward_shift))
    return m.attention_gate * attended, m.feed_forward_gate * fed


def test_unit_norm_makes_keys_unit_vectors_and_queries_of_the_learned_length() -> None:
    q, k = UnitNorm(HEADS)(torch.randn(BATCH, HEADS, TOKENS, 16), torch.randn(BATCH, HEADS, TOKENS, 16))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((BATCH, HEADS, TOKENS), 4.0))  # exp(log 4) at the start
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(BATCH, HEADS, TOKENS))


def test_the_learned_length_of_queries_stops_at_100() -> None:
    norm = UnitNorm(HEADS)
    torch.nn.init.constant_(norm.log_scale, 50.0)
    q, _ = norm(torch.randn(1, HEADS, 1, 16), torch.randn(1, HEADS, 1, 16))
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, HEADS, 1), 100.0))


def test_attention_without_unit_norm_takes_a_quarter_of_the_usual_scale() -> None:
    assert SelfAttention(WIDTH, HEADS, qk_norm=False).softmax_scale == 0.25 / math.sqrt(16)
    assert SelfAttention(WIDTH, HEADS, qk_norm=True).softmax_scale == 1.0


def test_attention_has_biases_for_queries_and_values_and_none_for_keys() -> None:
    attention, x = SelfAttention(WIDTH, HEADS, qk_norm=False), torch.randn(BATCH, TOKENS, WIDTH)
    torch.nn.init.normal_(attention.q_bias)
    torch.nn.init.normal_(attention.v_bias)
    q, k, v = F.linear(x, attention.qkv.weight).chunk(3, dim=-1)
    q, v = q + attention.q_bias, v + attention.v_bias
    q, k, v = (t.reshape(BATCH, TOKENS, HEADS, 16).transpose(1, 2) for t in (q, k, v))
    heads = (attention.softmax_scale * q @ k.transpose(2, 3)).softmax(dim=-1) @ v
    torch.testing.assert_close(attention(x), attention.proj(heads.transpose(1, 2).flatten(2)))


def test_modulate_is_a_layer_norm_scaled_and_shifted() -> None:
    x, scale, shift = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 1, WIDTH), torch.randn(BATCH, 1, WIDTH)
    centred = x - x.mean(dim=-1, keepdim=True)
    wanted = centred / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulate(x, scale, shift), wanted)


def test_the_six_vectors_come_in_the_order_of_the_released_weights() -> None:
    modulation = Modulation(WIDTH)
    torch.nn.init.zeros_(modulation.linear.weight)
    modulation.linear.bias.data = torch.arange(6.0).repeat_interleave(WIDTH)
    m = modulation(torch.randn(BATCH, WIDTH))
    vectors = (
        m.attention_gate,
        m.feed_forward_gate,
        m.attention_scale,
        m.feed_forward_scale,
        m.attention_shift,
        m.feed_forward_shift,
    )
    for position, vector in enumerate(vectors):
        assert torch.equal(vector, torch.full((BATCH, 1, WIDTH), float(position)))


def test_shared_modulation_adds_an_offset_to_the_shared_vectors() -> None:
    modulation, shared = SharedModulation(WIDTH), torch.randn(BATCH, 6, WIDTH)
    torch.nn.init.normal_(modulation.offset)
    torch.testing.assert_close(modulation(shared).attention_scale.squeeze(1), shared[:, 2] + modulation.offset[2])


@pytest.mark.parametrize("kind", ["adaln", "layer_norm"])
def test_a_residual_scale_of_zero_removes_the_branch(kind: str) -> None:
    block, x, condition = make_block(kind), torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, WIDTH)
    assert torch.equal(block(x, condition, residual_scale=torch.zeros(2, BATCH)), x)
    torch.testing.assert_close(block(x, condition, residual_scale=torch.ones(2, BATCH)), block(x, condition))


@pytest.mark.parametrize("kind", ["adaln", "layer_norm"])
@pytest.mark.parametrize("kept", [0, 1])
def test_the_two_branches_are_scaled_sample_by_sample(kind: str, kept: int) -> None:
    block, x, condition = make_block(kind), torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, WIDTH)
    residual_scale = torch.zeros(2, BATCH)
    residual_scale[kept, 1] = 2.0
    out = block(x, condition, residual_scale=residual_scale)
    branch = branches_of(block, x, condition)[kept]
    torch.testing.assert_close(out[1], x[1] + 2 * branch[1])
    assert torch.equal(out[[0, 2]], x[[0, 2]])


def test_the_cache_returns_everything_stored_so_far() -> None:
    cache = KVCache.allocate(2, BATCH, HEADS, 6, 16, torch.float32, "cpu")
    parts = [torch.randn(BATCH, HEADS, n, 16) for n in (1, 2, 3)]
    for stored, part in enumerate(parts, start=1):
        for layer in range(2):
            k, v = cache.layers()[layer].update(part + layer, -part)
            torch.testing.assert_close(k, torch.cat(parts[:stored], dim=2) + layer)
            torch.testing.assert_close(v, -torch.cat(parts[:stored], dim=2))
        cache.advance(part.shape[2])
    assert cache.position == 6
