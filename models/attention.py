"""Block-causal attention: queries of scale k see the keys of scales up to k (Sec. 3.2, Fig. 4), without a dense mask.

Three ways to the same numbers. `per_scale` makes one unmasked call for each scale, with its queries and the keys that
they may see: nothing is computed that is thrown away, and it runs everywhere. `flex` is one fused kernel that skips
what is masked (FlexAttention). `masked` is the plain one, with a dense mask: the specification of the other two.

Shapes: B batch, L tokens of all scales, H heads, D/H head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from models.scales import Scales

PER_SCALE, FLEX, MASKED = "per_scale", "flex", "masked"
ATTENTIONS = (PER_SCALE, FLEX, MASKED)
FLEX_BLOCK = 128  # queries and keys that FlexAttention keeps or skips together


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
    """Attend from all queries (B, H, n, D/H) to all keys and values (B, H, m, D/H): -> (B, H, n, D/H)."""
    return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale)


@dataclass(frozen=True)
class BlockCausalAttention:
    """Attention over the tokens of all scales of a schedule, all at once."""

    scales: Scales
    way: str = PER_SCALE

    def __post_init__(self) -> None:
        if self.way not in ATTENTIONS:
            raise ValueError(f"attention '{self.way}' is not one of {', '.join(ATTENTIONS)}")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
        """Attend from each token to its own and earlier scales: q, k, v (B, H, L, D/H) -> (B, H, L, D/H)."""
        return self.on(q.device)(q, k, v, softmax_scale=softmax_scale)

    def on(self, device: torch.device) -> Callable[..., Tensor]:
        """Return the call as a plain function, with its mask or block lists already on `device`.

        torch.compile then sees tensors alone, and all layers share what is made here.
        """
        if self.way == PER_SCALE:
            return partial(per_scale, self.scales.scale_sizes)
        if self.way == MASKED:
            return partial(masked, self.scales.block_causal_mask(device))
        return partial(flex, flex_block_mask(self.scales, device))


def per_scale(scale_sizes: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
    """Attend with one unmasked call for each scale, of `scale_sizes` tokens.

    Each scale's keys and values are joined to those before them, rather than cut from the whole: the gradient of a cut
    is the whole sequence again, zeros and all, which costs more than the copies.
    """
    k_seen = v_seen = q.new_empty(*q.shape[:2], 0, q.shape[-1])
    parts = []
    for q_here, k_here, v_here in zip(*(part.split(scale_sizes, dim=2) for part in (q, k, v)), strict=True):
        k_seen, v_seen = torch.cat([k_seen, k_here], dim=2), torch.cat([v_seen, v_here], dim=2)
        parts.append(full_attention(q_here, k_seen, v_seen, softmax_scale=softmax_scale))
    return torch.cat(parts, dim=2)


def masked(mask: Tensor, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
    """Attend with one call over all pairs and an (L, L) mask, for comparison.

    Where torch takes cuDNN's kernel, as on Hopper since 2.11, its gradient of a masked call can be NaN
    if L % 128 is 64, as for the 2,240 tokens of 512 px (pytorch issue 196678).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)


def flex(block_mask: BlockMask, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float) -> Tensor:
    """Attend with one fused call that skips masked blocks of pairs. On the CPU it has no gradient and no speed."""
    is_fused_by_caller = q.device.type == "cpu" or torch.compiler.is_compiling()
    if is_fused_by_caller:
        return flex_attention(q, k, v, block_mask=block_mask, scale=softmax_scale)
    return compiled_flex_attention()(q, k, v, block_mask=block_mask, scale=softmax_scale)


@lru_cache(maxsize=1)
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Compile FlexAttention once for the process; without compilation it computes all pairs."""
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def flex_block_mask(scales: Scales, device: torch.device) -> BlockMask:
    """Make FlexAttention's lists of blocks of FLEX_BLOCK x FLEX_BLOCK pairs that are seen whole or in part.

    They come from the ends of the scales alone; a mask of all L^2 pairs is never made.
    """
    ends = torch.cat([torch.full((tokens.stop - tokens.start,), tokens.stop) for tokens in scales.slices])  # (L,)
    starts = torch.arange(0, scales.num_tokens, FLEX_BLOCK)
    stops = starts + FLEX_BLOCK  # of the last block beyond the tokens: never whole
    whole = (stops[None, :] <= ends[starts][:, None]) & (stops <= scales.num_tokens)[:, None]  # by all its queries
    touched = starts[None, :] < ends[stops.clamp(max=scales.num_tokens) - 1][:, None]  # by its last query
    seen_until = ends.to(device)
    return BlockMask.from_kv_blocks(
        *_block_lists(touched & ~whole, device),
        *_block_lists(whole, device),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, query, key: key < seen_until[query],
        seq_lengths=(scales.num_tokens, scales.num_tokens),
    )


def _block_lists(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Count the chosen key blocks of each query block, and sort their numbers to the front.

    chosen (rows, all) bool -> counts (1, 1, rows) and numbers (1, 1, rows, all), int32.
    """
    counts = chosen.sum(dim=1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].to(device), order[None, None].to(device)
