"""Generation: sample scale after scale, coarse to fine (Fig. 4 right), with classifier-free guidance, top-k and top-p.

`cfg` is in VAR's units: 0 is no guidance, otherwise guidance grows over the scales from 0 to `cfg`. Randomness is a
function of one seed per image, so image i is the same in any batch. Decoding the codes to images is the tokenizer's.

Shapes: B batch, K scales, L tokens, p_k side of token map k, V vocabulary.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from models.transformer import KVCache
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig


def guidance_schedule(cfg: float, num_scales: int) -> list[float]:
    """Guidance of every scale, from 0 at the first to `cfg` at the last: t_k = cfg k / (K - 1) (public code)."""
    return [cfg * k / max(num_scales - 1, 1) for k in range(num_scales)]


def guide(conditional: Tensor, unconditional: Tensor, t: float) -> Tensor:
    """Classifier-free guidance of strength t: away from what would be predicted without the class."""
    return (1 + t) * conditional - t * unconditional


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the likeliest tokens of (..., V), cut the others to -inf: top-k, then top-p of what is left.

    top_k: how many, 0 = all; ties with the last one stay. top_p: the fewest whose probability reaches it, 0 or 1 = all.
    """
    vocab_size = logits.shape[-1]
    if 0 < top_k < vocab_size:
        kth_largest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1)
        is_cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        is_cut[..., -1] = False
        logits = logits.masked_fill(is_cut.scatter(-1, order, is_cut), -torch.inf)
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: logits (B, n, V), uniforms (B, n) in [0, 1) -> tokens (B, n) int64.

    One number per token instead of V makes it cheap to draw noise per image. In float64 u * total stays below total.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)                             # (B, n, V)
    thresholds = uniforms.to(cumulative)[..., None] * cumulative[..., -1:]                  # (B, n, 1)
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)               # (B, n)


@torch.no_grad()
def generate(var: VAR, tokenizer: VQVAE, labels: Tensor, *, cfg: float = 1.5, top_k: int = 900, top_p: float = 0.96,
             seeds: Sequence[int] | Tensor | None = None) -> Tensor:
    """Sample codes of one image per label: labels (B,) int64 -> codes (B, L) int64.

    cfg: guidance at the last scale, 0 = off. top_k, top_p: see filter_logits. seeds: one per image, unless top_k = 1.
    The guidance t of the first scale is 0, yet its unconditional half is computed: later scales attend to it.
    """
    check_configs_agree(var.config, tokenizer.config)
    check_sampling(cfg, top_k, top_p)
    generators = image_generators(seeds, num_images=labels.shape[0]) if top_k != 1 else None
    is_guided = cfg != 0
    all_labels = torch.cat([labels, torch.full_like(labels, var.config.null_class)]) if is_guided else labels
    cache = var.allocate_cache(all_labels.shape[0])
    f_hat = tokenizer.quantizer.empty_f_hat(labels.shape[0])                                # (B, C, h, w)
    token_maps = []
    for k, t in enumerate(guidance_schedule(cfg, var.scales.num_scales)):
        inputs = None if k == 0 else tokenizer.quantizer.next_input(f_hat, k)               # (B, p_k^2, C)
        logits = guided_logits(var, inputs, all_labels, k, cache, t=t) if is_guided \
            else var.forward_scale(inputs, all_labels, k, cache)                            # (B, p_k^2, V)
        tokens = choose_tokens(filter_logits(logits, top_k, top_p), generators)             # (B, p_k^2)
        token_maps.append(tokens)
        f_hat = f_hat + tokenizer.quantizer.embed_scale(tokens, k)
    return var.scales.join(token_maps)


def guided_logits(var: VAR, inputs: Tensor | None, labels: Tensor, k: int, cache: KVCache, *, t: float) -> Tensor:
    """Logits of scale k under guidance t: inputs (B, p_k^2, C), labels (2B,) real then null -> (B, p_k^2, V)."""
    both_inputs = None if inputs is None else torch.cat([inputs, inputs])                   # (2B, p_k^2, C)
    conditional, unconditional = var.forward_scale(both_inputs, labels, k, cache).chunk(2)
    return guide(conditional, unconditional, t)


def choose_tokens(logits: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    """The likeliest token without generators, a draw with: logits (B, n, V) -> (B, n)."""
    if generators is None:
        return logits.argmax(dim=-1)
    uniforms = torch.stack([torch.rand(logits.shape[1], generator=generator) for generator in generators])  # (B, n)
    return sample_tokens(logits, uniforms)


def image_generators(seeds: Sequence[int] | Tensor | None, *, num_images: int) -> list[torch.Generator]:
    """One CPU generator per image."""
    seeds = [] if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != num_images:
        raise ValueError(f"got {len(seeds)} seeds for {num_images} images, expected one per image (none if top_k is 1)")
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def check_configs_agree(var: VARConfig, tokenizer: VQVAEConfig) -> None:
    """Raise ValueError where the transformer was made for another tokenizer."""
    for name, got, wanted in (("patch_nums", var.patch_nums, tokenizer.patch_nums),
                              ("vocab_size", var.vocab_size, tokenizer.quantizer.vocab_size),
                              ("code_width", var.code_width, tokenizer.quantizer.code_width)):
        if got != wanted:
            raise ValueError(f"the transformer has {name} {got}, the tokenizer {wanted}; use the one it was trained on")


def check_sampling(cfg: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for a setting that means nothing."""
    if cfg < 0:
        raise ValueError(f"cfg {cfg} must be 0 (no guidance) or more")
    if top_k < 0:
        raise ValueError(f"top_k {top_k} must be 0 (all tokens) or more")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p {top_p} is outside [0, 1]")
