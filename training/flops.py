"""Parameters and floating point operations, from the architecture alone.

Conventions: one multiply-accumulate (MAC) is 2 FLOPs; a training step is 3 forward passes' worth (one forward, two
backward); AdaLN acts once per image, not once per token; attention counts the block-causal pairs that carry
information, 286,434 at 256 px, not the masked square. Compute is reported in PFLOP, a total of 1e15 operations, never
per second.
"""

from __future__ import annotations

from models.scales import Scales
from models.var import VARConfig

FLOPS_PER_PFLOP = 10**15


def attention_pairs(scales: Scales) -> int:
    """Pairs (query, key) of block-causal attention: every token of scale k sees all tokens up to scale k."""
    return sum((part.stop - part.start) * part.stop for part in scales.slices)


def forward_macs(config: VARConfig) -> int:
    """Multiply-accumulates of one teacher-forced forward pass over one image."""
    depth, width, tokens = config.depth, config.width, config.scales.num_tokens
    tokens_in = tokens - config.scales.patch_nums[0] ** 2
    hidden = round(config.mlp_ratio * width)
    linear = depth * tokens * (4 * width * width + 2 * width * hidden)  # qkv, projection, two of the FFN
    attention = depth * 2 * attention_pairs(config.scales) * width  # q k^T and the weighted sum of v
    modulation = (1 if config.shared_adaln else depth) * 6 * width * width + 2 * width * width  # once per image
    ends = tokens_in * config.code_width * width + tokens * width * config.vocab_size
    return linear + attention + modulation + ends


def training_flops(config: VARConfig) -> int:
    """FLOPs of one training image: 2 per MAC, three times the forward pass. Recomputed activations are not counted."""
    return 6 * forward_macs(config)
