"""Parameters and floating point operations, from the architecture alone.

Conventions: one multiply-accumulate (MAC) is 2 FLOPs; a training step is 3 forward passes' worth (one forward, two
backward); AdaLN acts once per image, not once per token; attention counts the block-causal pairs that carry
information, 286,434 at 256 px, not the masked square. Compute is reported in PFLOP, a total of 1e15 operations, never
per second. Other conventions are in use; a scaling study reports four of them side by side, see `flops_per_image`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import Decoder, Encoder
from models.sampling import num_doubled_scales
from models.scales import Scales
from models.var import ADALN, LAYER_NORM, SHARED_ADALN, VARConfig
from models.vqvae import VQVAEConfig
from training.accounting import DENSE_MASK, EXACT, PAPER, SIX_NT


def attention_pairs(scales: Scales) -> int:
    """Pairs (query, key) of block-causal attention: every token of scale k sees all tokens up to scale k."""
    return sum(size * part.stop for size, part in zip(scales.scale_sizes, scales.slices, strict=True))


def eq8_parameters(config: VARConfig) -> int:
    """The matrices of the blocks: 18 d w^2 (eq. 8), of which 6 d w^2 are AdaLN's.

    With shared AdaLN 12 d w^2 and one map of 6 w^2 (footnote 3); without AdaLN 12 d w^2.
    """
    depth, width = config.depth, config.width
    num_maps = {ADALN: 6 * depth, SHARED_ADALN: 6, LAYER_NORM: 0}[config.norm]
    return block_weights(config) + num_maps * width * width


def forward_macs(config: VARConfig) -> int:
    """Multiply-accumulates of one teacher-forced forward pass over one image."""
    return _forward_macs(config, pairs=attention_pairs(config.scales))


def training_flops(config: VARConfig) -> int:
    """Count the FLOPs of one training image: 2 per MAC, three times the forward pass, without any recomputation."""
    return 6 * forward_macs(config)


def flops_per_image(config: VARConfig) -> dict[str, int]:
    """Count the operations of training on one image, by each of ACCOUNTINGS.

    exact: `training_flops`, the default everywhere.
    dense_mask: the same with all L^2 pairs, which a kernel with a dense mask computes and then throws away.
    six_nt: 6 N T of Kaplan et al. 2020, with T = L tokens and N the total parameters, as the paper's "18M to 2B" are
        totals too. It takes AdaLN and embeddings for work done at every token, and leaves attention out.
    paper: the MACs of one forward pass, no backward pass, a MAC as one operation. The paper does not say what its C
        counts; this is what its numbers fit (training/laws/paper_laws.py), so it is an inference.
    """
    tokens = config.scales.num_tokens
    return {
        EXACT: training_flops(config),
        DENSE_MASK: 6 * _forward_macs(config, pairs=tokens**2),
        SIX_NT: 6 * config.num_parameters * tokens,
        PAPER: forward_macs(config),
    }


def block_weights(config: VARConfig) -> int:
    """Count the weights of the blocks that act on every token: qkv, projection, and two of the feed-forward."""
    return config.depth * (4 * config.width**2 + 2 * config.width * config.hidden_width)


def _forward_macs(config: VARConfig, *, pairs: int) -> int:
    depth, width, tokens = config.depth, config.width, config.scales.num_tokens
    tokens_in = tokens - config.scales.first_tokens
    linear = tokens * block_weights(config)
    attention = depth * 2 * pairs * width  # q k^T and the weighted sum of v
    ends = tokens_in * config.code_width * width + tokens * width * config.vocab_size
    return linear + attention + modulation_weights(config) + ends


def modulation_weights(config: VARConfig) -> int:
    """Count the weights of AdaLN's maps, that of the final norm included: they act on the class, once per image."""
    num_maps = {ADALN: config.depth * 6 + 2, SHARED_ADALN: 6 + 2, LAYER_NORM: 0}[config.norm]
    return num_maps * config.width * config.width


def generation_flops(config: VARConfig, guidance: Sequence[float]) -> int:
    """Count the FLOPs of drawing one image's codes, with guidance of these strengths at the K scales, and feature map.

    The unconditional half runs up to the last guided scale; its logits are made where guidance is not 0. phi acts on
    the whole feature map at every scale. What no product is in is not counted: noise, filters, resizing.
    """
    scales, width = config.scales, config.width
    num_doubled = num_doubled_scales(guidance)
    tokens = sum(scales.scale_sizes[:num_doubled])
    pairs = sum(size * part.stop for size, part in zip(scales.scale_sizes[:num_doubled], scales.slices))
    guided_tokens = sum(size for size, t in zip(scales.scale_sizes, guidance, strict=True) if t)
    macs = forward_macs(config) + scales.num_scales * 9 * config.code_width**2 * scales.side**2
    if num_doubled:
        macs += tokens * block_weights(config) + config.depth * 2 * pairs * width + modulation_weights(config)
        macs += (tokens - scales.first_tokens) * config.code_width * width + guided_tokens * width * config.vocab_size
    return 2 * macs


def decoding_flops(config: VQVAEConfig, *, is_folded: bool) -> int:
    """FLOPs from one feature map to an image; is_folded: as after VQVAE.prepare_decoder."""
    with torch.device("meta"):
        decoder = Decoder(config.autoencoder)
    if is_folded:
        decoder.fold_upsampling()
    scales, width = config.scales, config.quantizer.code_width
    return _counted(decoder, width, scales.side) + 2 * 9 * width**2 * scales.side**2


def encoding_flops(config: VQVAEConfig) -> int:
    """FLOPs from one image to its codes: encoder, convolution, and at every scale the search and phi."""
    with torch.device("meta"):
        encoder = Encoder(config.autoencoder)
    return _counted(encoder, 3, config.image_size) + 2 * _quantizer_macs(config, num_convolutions=1)


@torch.no_grad()
def _counted(module: nn.Module, channels: int, side: int) -> int:
    """Count the FLOPs of a module on the meta device on one square map, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        module(torch.empty(1, channels, side, side, device="meta"))
    return counter.get_total_flops()


def _quantizer_macs(config: VQVAEConfig, *, num_convolutions: int) -> int:
    """The code search, one phi a scale, and so many of the convolutions around the quantiser."""
    scales, quantizer = config.scales, config.quantizer
    search = scales.num_tokens * quantizer.vocab_size * quantizer.code_width
    return search + (scales.num_scales + num_convolutions) * 9 * quantizer.code_width**2 * scales.side**2


def tokenizer_training_flops(config: VQVAEConfig) -> int:
    """Count the FLOPs of one training image of stage 1, without LPIPS and discriminator.

    Encoder and decoder are counted by torch on the meta device; the quantiser is the code search and one phi a scale.
    """
    scales, quantizer = config.scales, config.quantizer
    with torch.device("meta"):
        encoder, decoder = Encoder(config.autoencoder), Decoder(config.autoencoder)
    counted = _counted(encoder, 3, config.image_size) + _counted(decoder, quantizer.code_width, scales.side)
    return 3 * (counted + 2 * _quantizer_macs(config, num_convolutions=2))
