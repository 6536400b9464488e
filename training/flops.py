"""Parameters and floating point operations, from the architecture alone.

Conventions: one multiply-accumulate (MAC) is 2 FLOPs; a training step is 3 forward passes' worth (one forward, two
backward); AdaLN acts once per image, not once per token; attention counts the block-causal pairs that carry
information, 286,434 at 256 px, not the masked square. Compute is reported in PFLOP, a total of 1e15 operations, never
per second.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import Decoder, Encoder
from models.scales import Scales
from models.var import ADALN, LAYER_NORM, SHARED_ADALN, VARConfig
from models.vqvae import VQVAEConfig

FLOPS_PER_PFLOP = 10**15


def attention_pairs(scales: Scales) -> int:
    """Pairs (query, key) of block-causal attention: every token of scale k sees all tokens up to scale k."""
    return sum(size * part.stop for size, part in zip(scales.scale_sizes, scales.slices, strict=True))


def forward_macs(config: VARConfig) -> int:
    """Multiply-accumulates of one teacher-forced forward pass over one image."""
    depth, width, tokens = config.depth, config.width, config.scales.num_tokens
    tokens_in = tokens - config.scales.first_tokens
    linear = depth * tokens * (4 * width * width + 2 * width * config.hidden_width)  # qkv, projection, two of the FFN
    attention = depth * 2 * attention_pairs(config.scales) * width  # q k^T and the weighted sum of v
    num_maps = {ADALN: depth * 6 + 2, SHARED_ADALN: 6 + 2, LAYER_NORM: 0}[config.norm]
    modulation = num_maps * width * width  # once per image
    ends = tokens_in * config.code_width * width + tokens * width * config.vocab_size
    return linear + attention + modulation + ends


def training_flops(config: VARConfig) -> int:
    """FLOPs of one training image: 2 per MAC, three times the forward pass. Recomputed activations are not counted."""
    return 6 * forward_macs(config)


def tokenizer_training_flops(config: VQVAEConfig) -> int:
    """FLOPs of one training image of stage 1, without LPIPS and discriminator.

    Encoder and decoder are counted by torch on the meta device; the quantiser is the code search and one phi a scale.
    """
    scales, quantizer = config.scales, config.quantizer
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Encoder(config.autoencoder)(torch.empty(1, 3, config.image_size, config.image_size))
        Decoder(config.autoencoder)(torch.empty(1, quantizer.code_width, scales.side, scales.side))
    search = scales.num_tokens * quantizer.vocab_size * quantizer.code_width
    convolutions = (scales.num_scales + 2) * 9 * quantizer.code_width**2 * scales.side**2  # phi, and one on either side
    return 3 * (counter.get_total_flops() + 2 * (search + convolutions))
