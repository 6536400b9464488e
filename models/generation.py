"""Generation: sample scale after scale, coarse to fine (Fig. 4 right), freely or around tokens that are given (Sec. 6).

Everything is one loop, `generate_scales`: plain generation knows no token beforehand, in-painting, out-painting and
editing know those that a mask keeps, and teacher-forced first scales are known as a whole. Known tokens take the place
of drawn ones before they are embedded, so they come out as they went in. Decoding codes to images is the tokenizer's.

Shapes: B batch, K scales, L tokens, p_k side of token map k, V vocabulary, C code width, h = w = p_K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.editing import keep_tokens
from models.sampling import (
    Sampling,
    choose_tokens,
    filter_logits,
    guide,
    image_seeds,
    num_doubled_scales,
    smooth_code_vectors,
)
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig

Seeds = Sequence[int] | Tensor | None


@dataclass(frozen=True)
class KnownTokens:
    """Tokens that are given instead of drawn."""

    codes: Tensor  # (B, L) int64; what stands where mask is False does not matter
    mask: Tensor  # (B, L) bool, True = given


@dataclass(frozen=True)
class Generated:
    """Drawn codes, and the feature map to decode. The map is that of the codes, unless sampling was smooth."""

    codes: Tensor  # (B, L) int64
    f_hat: Tensor  # (B, C, h, w)


def generate(
    var: VAR,
    tokenizer: VQVAE,
    labels: Tensor,
    *,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seeds: Seeds = None,
) -> Tensor:
    """Sample codes of one image per label: labels (B,) int64 -> codes (B, L) int64.

    cfg, top_k, top_p: see Sampling. seeds: one per image; none are needed if top_k is 1. Raises ValueError as
    `generate_scales` does.
    """
    sampling = Sampling(cfg=cfg, top_k=top_k, top_p=top_p)
    return generate_scales(var, tokenizer, labels, sampling, seeds=seeds).codes


def edit(
    var: VAR,
    tokenizer: VQVAE,
    images: Tensor,
    keep_mask: Tensor,
    labels: Tensor,
    *,
    cfg: float = 3.0,
    top_k: int = 900,
    top_p: float = 0.95,
    seeds: Seeds = None,
    keep_coarsest: bool = True,
) -> Tensor:
    """Keep a part of each image and draw the rest anew: in-painting, out-painting, class-conditional editing (Sec. 6).

    images: (B, 3, H, W) in [-1, 1]. keep_mask: (h, w) or (B, h, w), true or 1 where the image stays, see `keep_tokens`.
    labels: (B,) int64, the class to draw, or var.config.null_class for none. Returns codes (B, L), in which the kept
    tokens are those of the image. Defaults and method are those of the public demo_zero_shot_edit notebook, but for its
    smoothing (Sampling.smooth). keep_coarsest: whether the 1x1 scale, a mean of the whole image, stays in any case.
    """
    known = known_part(tokenizer, images, keep_mask, keep_coarsest=keep_coarsest)
    sampling = Sampling(cfg=cfg, top_k=top_k, top_p=top_p)
    return generate_scales(var, tokenizer, labels, sampling, seeds=seeds, known=known).codes


def known_part(tokenizer: VQVAE, images: Tensor, keep_mask: Tensor, *, keep_coarsest: bool) -> KnownTokens:
    """Encode images (B, 3, H, W) and mark the tokens that a mask keeps; arguments as for `edit`."""
    codes = tokenizer.encode(images)  # (B, L)
    mask = keep_tokens(tokenizer.scales, keep_mask.to(codes.device), keep_coarsest=keep_coarsest)
    if mask.shape[0] not in (1, images.shape[0]):
        raise ValueError(f"keep_mask holds {mask.shape[0]} masks for {images.shape[0]} images; give one, or one each")
    return KnownTokens(codes, mask.expand(codes.shape))


@torch.no_grad()
def generate_scales(
    var: VAR,
    tokenizer: VQVAE,
    labels: Tensor,
    sampling: Sampling,
    *,
    seeds: Seeds = None,
    known: KnownTokens | None = None,
) -> Generated:
    """Draw scale k given all before it, put known tokens in place, add the result to f_hat; for all k.

    labels: (B,) int64, 0 to num_classes, the last being the null class.

    Raises:
        ValueError: the models do not fit together; seeds, labels, known tokens or guidance do not fit the models; or
            the logits are not finite.
    """
    check_configs_agree(var.config, tokenizer.config)
    check_labels(labels, var.config)
    check_known(known, labels.shape[0], var.config)
    seeds = None if sampling.is_greedy else image_seeds(seeds, labels.shape[0], labels.device)
    scales, quantizer = var.scales, tokenizer.quantizer
    schedule = sampling.schedule(scales.num_scales)
    if (labels == var.config.null_class).all():
        schedule = (0.0,) * scales.num_scales  # both halves would be the same: there is nothing to guide towards
    model = GuidedModel(var, labels, schedule)
    f_hat = quantizer.empty_f_hat(labels.shape[0])  # (B, C, h, w)
    is_finite, token_maps = torch.ones((), dtype=torch.bool, device=labels.device), []
    for k, part in enumerate(scales.slices):
        inputs = None if k == 0 else quantizer.next_input(f_hat, k)  # (B, p_k^2, C)
        logits = model.logits(inputs, k)  # (B, p_k^2, V)
        is_finite = is_finite & logits.isfinite().all()
        tokens = choose_tokens(logits, seeds, part, top_k=sampling.top_k, top_p=sampling.top_p)  # (B, p_k^2)
        vectors = quantizer.lookup(tokens)  # (B, p_k^2, C)
        if sampling.smooth:
            progress = k / max(scales.num_scales - 1, 1)
            logits = filter_logits(logits, sampling.top_k, sampling.top_p)
            vectors = smooth_code_vectors(logits, seeds, part, quantizer.codebook, progress=progress)
        if known is not None:
            is_known = known.mask[:, part]  # (B, p_k^2)
            tokens = torch.where(is_known, known.codes[:, part], tokens)
            vectors = torch.where(is_known[..., None], quantizer.lookup(tokens), vectors)
        token_maps.append(tokens)
        f_hat = f_hat + quantizer.embed_vectors(vectors, k)
    if not is_finite:
        raise ValueError(
            f"the transformer's logits are not finite in {var.position_embedding.dtype}; the weights are "
            "damaged, or the precision is too low: use fp32"
        )
    return Generated(scales.join(token_maps), f_hat)


class GuidedModel:
    """Logits of one scale after another under a guidance schedule.

    A guided scale attends to all earlier ones, in both halves of the batch. So the unconditional half runs, beside the
    conditional one, up to the last scale with guidance and no further; its logits are made only where there is some.
    """

    def __init__(self, var: VAR, labels: Tensor, schedule: Sequence[float]) -> None:
        self.var = var
        self.schedule = schedule
        self.batch = labels.shape[0]
        self.num_doubled = num_doubled_scales(schedule)  # scales with both halves
        if self.num_doubled:
            labels = torch.cat([labels, torch.full_like(labels, var.config.null_class)])  # (2B,)
        self.classes = var.class_vectors(labels)
        self.cache = var.allocate_cache(labels.shape[0])

    def logits(self, inputs: Tensor | None, k: int) -> Tensor:
        """Predict scale k under guidance: inputs (B, p_k^2, C), None at the first scale -> (B, p_k^2, V) float32."""
        conditional, t = slice(self.batch), self.schedule[k]
        if k == self.num_doubled:
            self.classes, self.cache = self.classes.rows(conditional), self.cache.rows(conditional)
        elif k < self.num_doubled and inputs is not None:
            inputs = torch.cat([inputs, inputs])  # (2B, p_k^2, C)
        wanted = slice(None) if t else conditional
        logits = self.var.forward_scale(inputs, self.classes, k, self.cache, wanted=wanted)
        if not t:
            return logits
        guided, unconditional = logits.chunk(2)
        return guide(guided, unconditional, t)


def check_configs_agree(var: VARConfig, tokenizer: VQVAEConfig) -> None:
    """Raise ValueError where the transformer was made for another tokenizer."""
    for name, got, wanted in (
        ("patch_nums", var.patch_nums, tokenizer.patch_nums),
        ("vocab_size", var.vocab_size, tokenizer.quantizer.vocab_size),
        ("code_width", var.code_width, tokenizer.quantizer.code_width),
    ):
        if got != wanted:
            raise ValueError(f"the transformer has {name} {got}, the tokenizer {wanted}; use the one it was trained on")


def check_labels(labels: Tensor, config: VARConfig) -> None:
    """Raise ValueError for labels that the model does not know."""
    if labels.ndim != 1:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected (batch,)")
    wrong = labels[(labels < 0) | (labels > config.null_class)]
    if wrong.numel():
        raise ValueError(
            f"label {wrong[0].item()} is not one of 0 to {config.null_class}, where {config.null_class} "
            "is the null class"
        )


def check_known(known: KnownTokens | None, batch: int, config: VARConfig) -> None:
    """Raise ValueError where known tokens have another shape than the codes to be made."""
    wanted = (batch, config.scales.num_tokens)
    if known is not None and (tuple(known.codes.shape) != wanted or tuple(known.mask.shape) != wanted):
        raise ValueError(
            f"known codes have shape {tuple(known.codes.shape)} and their mask {tuple(known.mask.shape)}, "
            f"expected {wanted}"
        )
