"""The parts of the VAR transformer: attention over this and earlier scales, feed-forward, AdaLN block, key-value cache.

A GPT-2-like decoder with two departures (Sec. 4): the class modulates every layer norm (AdaLN), and queries and keys
are unit vectors. Both can be left out, as in the ablation of Table 3. Nothing here draws random numbers or depends on
train/eval mode; stochastic depth arrives as `residual_scale`. Each parameter is read only in the forward of the module
that owns it, so that weights can be partitioned from outside.

Shapes: B batch, n tokens in this call, m tokens that may be seen (n in training, all so far with a cache), D model
width, H heads, D/H head width, K scales.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import full_attention

NORM_EPS = 1e-6
MAX_LOG_SCALE = math.log(100)
INITIAL_LOG_SCALE = math.log(4)
NUM_MODULATIONS = 6
MIN_LENGTH = 1e-12
Attend = Callable[..., Tensor]  # q, k, v (B, H, n or m, D/H), softmax_scale= -> (B, H, n, D/H)


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a KVCache, a view. It does not know its layer, so all layers share compiled code."""

    keys: Tensor  # (B, H, L, D/H)
    values: Tensor  # (B, H, L, D/H)
    position: int  # tokens of finished scales

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this scale's keys and values (B, H, n, D/H); return those of all so far (B, H, m, D/H)."""
        end = self.position + k.shape[2]
        self.keys[:, :, self.position : end] = k
        self.values[:, :, self.position : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class KVCache:
    """Keys and values of the scales generated so far, preallocated for all. A value: made, passed on, dropped."""

    keys: Tensor  # (layers, B, H, L, D/H)
    values: Tensor  # (layers, B, H, L, D/H)
    position: int = 0  # tokens of finished scales

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        batch: int,
        num_heads: int,
        num_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "KVCache":
        """Allocate an empty cache for `num_tokens` tokens of every layer."""
        shape = (num_layers, batch, num_heads, num_tokens, head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    def layers(self) -> list[LayerCache]:
        """Return the part of each layer, at this position."""
        return [LayerCache(keys, values, self.position) for keys, values in zip(self.keys, self.values)]

    def rows(self, part: slice) -> "KVCache":
        """Return the cache of a part of the batch: the same storage, a position of its own."""
        return KVCache(self.keys[:, part], self.values[:, part], self.position)

    def advance(self, num_tokens: int) -> None:
        """Close a scale of `num_tokens`, once all layers have stored it."""
        self.position += num_tokens


class UnitNorm(nn.Module):
    """Queries and keys as unit vectors, queries times a learned scale per head (Sec. 4; ablated in Table 3)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((num_heads,), INITIAL_LOG_SCALE))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.log_scale.float().clamp(max=MAX_LOG_SCALE).exp()[:, None, None]  # (H, 1, 1)
        wide_q, wide_k = q.float(), k.float()
        # one product with a small factor: a unit vector made first would be one more tensor of q's size to keep
        return (wide_q * (scale * inverse_length(wide_q))).to(q.dtype), (wide_k * inverse_length(wide_k)).to(k.dtype)


def inverse_length(x: Tensor) -> Tensor:
    """Return 1 / max(length, 1e-12) of each vector, as F.normalize takes it: (..., D) -> (..., 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(MIN_LENGTH).reciprocal()


class LinearWithGivenBias(nn.Linear):
    """A linear layer whose bias comes as an argument: (..., in), (out,) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(input, self.weight, bias)


class SelfAttention(nn.Module):
    """Multi-head attention. Queries and values have a bias, keys have none: softmax would cancel it."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = LinearWithGivenBias(width, 3 * width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qk_norm = UnitNorm(num_heads) if qk_norm else None
        # without unit vectors the public code takes a quarter of the usual 1 / sqrt(D/H)
        self.softmax_scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *, attend: Attend = full_attention, cache: LayerCache | None = None) -> Tensor:
        """Attend within x (B, n, D) -> (B, n, D); with a cache, x is one scale and sees all scales so far."""
        qkv = self.qkv(x, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))  # (B, n, 3D)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, n, D/H)
        q, k, v = qkv.unbind(0)  # (B, H, n, D/H)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q, k)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, H, m, D/H)
        heads = attend(q, k, v, softmax_scale=self.softmax_scale)  # (B, H, n, D/H)
        return self.proj(heads.transpose(1, 2).flatten(2))  # (B, n, D)


class FeedForward(nn.Module):
    """Two linear layers around a GELU (tanh form): (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@dataclass(frozen=True)
class ModulationVectors:
    """What the class does to one block, each (B, 1, D). The order is that of the released weights."""

    attention_gate: Tensor  # gamma1
    feed_forward_gate: Tensor  # gamma2
    attention_scale: Tensor  # scale1
    feed_forward_scale: Tensor  # scale2
    attention_shift: Tensor  # shift1
    feed_forward_shift: Tensor  # shift2

    def __getitem__(self, part: slice) -> "ModulationVectors":
        """Return the vectors of a part of the batch."""
        return ModulationVectors(*(getattr(self, vector.name)[part] for vector in fields(self)))


class Modulation(nn.Module):
    """AdaLN of one block: a linear map of the condition (B, D) to the six vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, NUM_MODULATIONS * width)

    def forward(self, condition: Tensor) -> ModulationVectors:
        vectors = self.linear(F.silu(condition)).unflatten(1, (NUM_MODULATIONS, 1, -1))  # (B, 6, 1, D)
        return ModulationVectors(*vectors.unbind(1))


class SharedModulation(nn.Module):
    """AdaLN of one block when all share the linear map: its result (B, 6, D) plus an offset of this block's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(NUM_MODULATIONS, width))

    def forward(self, shared: Tensor) -> ModulationVectors:
        return ModulationVectors(*(shared + self.offset).unsqueeze(2).unbind(1))  # six of (B, 1, D)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Adaptive layer norm: normalise x (B, n, D) without weights of its own, then scale and shift by (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


def branch_factor(residual_scale: Tensor | None, branch: int, x: Tensor) -> Tensor | float:
    """Return the factor on branch 0 (attention) or 1 (feed-forward): residual_scale (2, B) -> (B, 1, 1), or 1."""
    return 1.0 if residual_scale is None else residual_scale[branch].to(x.dtype)[:, None, None]


class AdaLNBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by the class."""

    def __init__(self, width: int, num_heads: int, *, hidden_width: int, qk_norm: bool, shared_adaln: bool) -> None:
        super().__init__()
        self.modulation = SharedModulation(width) if shared_adaln else Modulation(width)
        self.attention = SelfAttention(width, num_heads, qk_norm=qk_norm)
        self.feed_forward = FeedForward(width, hidden_width)

    def vectors(self, condition: Tensor) -> ModulationVectors:
        """Make the six vectors of the condition, which `forward` takes in its place."""
        return self.modulation(condition)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | ModulationVectors,
        *,
        attend: Attend = full_attention,
        cache: LayerCache | None = None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """Transform x (B, n, D) -> (B, n, D).

        condition: (B, D), or (B, 6, D) when AdaLN is shared, or its `vectors`. residual_scale: (2, B), factors on each
        sample's attention and feed-forward branches; 0 or 1 / keep gives stochastic depth.
        """
        m = condition if isinstance(condition, ModulationVectors) else self.vectors(condition)
        h = self.attention(modulate(x, m.attention_scale, m.attention_shift), attend=attend, cache=cache)
        x = torch.addcmul(x, branch_factor(residual_scale, 0, x) * m.attention_gate, h)
        h = self.feed_forward(modulate(x, m.feed_forward_scale, m.feed_forward_shift))
        return torch.addcmul(x, branch_factor(residual_scale, 1, x) * m.feed_forward_gate, h)


class LayerNormBlock(nn.Module):
    """GPT-2's block: plain layer norms with weights of their own and no gates (Table 3, row 2)."""

    def __init__(self, width: int, num_heads: int, *, hidden_width: int, qk_norm: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = SelfAttention(width, num_heads, qk_norm=qk_norm)
        self.feed_forward_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feed_forward = FeedForward(width, hidden_width)

    def vectors(self, condition: Tensor) -> Tensor:
        """Return the condition itself: there is nothing to make of it."""
        return condition

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        *,
        attend: Attend = full_attention,
        cache: LayerCache | None = None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        """Transform x (B, n, D) -> (B, n, D), see `AdaLNBlock`. The condition is ignored."""
        h = self.attention(self.attention_norm(x), attend=attend, cache=cache)
        x = x + branch_factor(residual_scale, 0, x) * h
        h = self.feed_forward(self.feed_forward_norm(x))
        return x + branch_factor(residual_scale, 1, x) * h


@dataclass(frozen=True)
class ScaleAndShift:
    """What the class does to the layer norm before the head, each (B, 1, D)."""

    scale: Tensor
    shift: Tensor

    def __getitem__(self, part: slice) -> "ScaleAndShift":
        """Return the vectors of a part of the batch."""
        return ScaleAndShift(self.scale[part], self.shift[part])


class FinalNorm(nn.Module):
    """The modulated layer norm before the head: x (B, n, D), condition (B, D) -> (B, n, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def vectors(self, condition: Tensor) -> ScaleAndShift:
        """Make scale and shift of the condition, which `forward` takes in its place."""
        return ScaleAndShift(*self.linear(F.silu(condition)).unflatten(1, (2, 1, -1)).unbind(1))

    def forward(self, x: Tensor, condition: Tensor | ScaleAndShift) -> Tensor:
        vectors = condition if isinstance(condition, ScaleAndShift) else self.vectors(condition)
        return modulate(x, vectors.scale, vectors.shift)


class PlainFinalNorm(nn.LayerNorm):
    """The layer norm before the head where the class modulates nothing: x (B, n, D) -> (B, n, D)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def vectors(self, condition: Tensor) -> Tensor:
        """Return the condition itself: there is nothing to make of it."""
        return condition

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(input)


@dataclass(frozen=True)
class ClassVectors:
    """All that the class does to an image in generation, which is the same at every scale: computed once."""

    embedding: Tensor  # (B, D)
    blocks: tuple[ModulationVectors | Tensor, ...]  # what each block makes of it
    final: ScaleAndShift | Tensor  # what the norm before the head makes of it

    def rows(self, part: slice) -> "ClassVectors":
        """Return the vectors of a part of the batch."""
        return ClassVectors(self.embedding[part], tuple(vectors[part] for vectors in self.blocks), self.final[part])


def cached_step(
    block: nn.Module, x: Tensor, vectors: ModulationVectors | Tensor, keys: Tensor, values: Tensor, position: int
) -> Tensor:
    """Run a block on one scale x (B, n, D) with its layer's part of the cache; torch.compile takes this function."""
    return block(x, vectors, cache=LayerCache(keys, values, position))
