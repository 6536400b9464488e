"""Multi-scale residual quantisation: a feature map into K token maps and back (VAR, Algorithms 1 and 2).

Two primitives carry everything: `embed_scale` (phi_k of the upsampled lookup) and `downsample`. Algorithm 1 subtracts
what the first gives, Algorithm 2 adds it up, and the input from which scale k+1 is predicted is `downsample` of the
running sum, in training and in generation alike. All is float32, autocast off: a rounded distance picks another code.

Shapes: B batch, K scales, L tokens, p_k side of token map k, p_K = h = w sides of the feature map, C code width,
V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.scales import Scales

# Which of four shared phi each scale uses. Scales 3 and 8 of 10 lie midway between two phi, and in the public code
# rounding decides; released tokenizers need exactly this choice, so it is written down instead of computed.
PHI_TABLES = {
    (10, 4): (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    (14, 4): (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}


@dataclass(frozen=True)
class QuantizerConfig:
    """The codebook and the residual convolutions phi."""

    vocab_size: int = 4096  # V
    code_width: int = 32  # C
    num_phi: int = 4  # phi shared by neighbouring scales; 0: one per scale (the paper), 1: one for all
    phi_ratio: float = 0.5  # share of the convolution in phi(x) = (1 - ratio) x + ratio conv(x)
    beta: float = 0.25  # weight of the commitment term, which pulls f towards f_hat

    def __post_init__(self) -> None:
        if self.vocab_size < 2 or self.code_width < 1:
            raise ValueError(f"vocab_size {self.vocab_size} and code_width {self.code_width} must be at least 2 and 1")
        if self.num_phi < 0:
            raise ValueError(f"num_phi {self.num_phi} must be 0 (one per scale) or more")
        if not 0 <= self.phi_ratio <= 1:
            raise ValueError(f"phi_ratio {self.phi_ratio} is outside [0, 1]")
        if self.beta < 0:
            raise ValueError(f"beta {self.beta} must not be negative")


@dataclass(frozen=True)
class Quantized:
    """What the training forward gives."""

    f_hat: Tensor  # (B, C, h, w) float32, straight-through: its gradient is that of f
    codes: Tensor  # (B, L) int64
    loss: Tensor  # () the quantisation terms of eq. 5, averaged over scales


def phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """Return which phi each of K scales uses: of `num_phi` points spread over [0, 1] the nearest to k / (K - 1)."""
    if num_phi == 0:
        return tuple(range(num_scales))
    if num_phi == 1 or num_scales == 1:
        return (0,) * num_scales
    if (num_scales, num_phi) in PHI_TABLES:
        return PHI_TABLES[num_scales, num_phi]
    first = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi  # the public code spreads four points wider
    step = (1 - first - first) / (num_phi - 1)
    points = [first + i * step for i in range(num_phi - 1)] + [1 - first]
    positions = [k / (num_scales - 1) for k in range(num_scales)]
    return tuple(min(range(num_phi), key=lambda i: abs(points[i] - position)) for position in positions)


class Phi(nn.Module):
    """The convolution that restores what upsampling loses: phi(x) = (1 - ratio) x + ratio conv(x), (B, C, h, w)."""

    def __init__(self, code_width: int, *, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(code_width, code_width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.ratio) * x + self.ratio * self.conv(x)


class MultiScaleQuantizer(nn.Module):
    """One codebook for all scales, and phi. Keep the weights in float32."""

    def __init__(self, config: QuantizerConfig, scales: Scales) -> None:
        super().__init__()
        self.config = config
        self.scales = scales
        self.phi_of_scale = phi_indices(scales.num_scales, config.num_phi)
        # As in VQGAN. Codes start together near 0, so the first searches compare directions and use many codes.
        bound = 1 / config.vocab_size
        self.codebook = nn.Parameter(torch.empty(config.vocab_size, config.code_width).uniform_(-bound, bound))
        num_phi = config.num_phi or scales.num_scales
        self.phi = nn.ModuleList(Phi(config.code_width, ratio=config.phi_ratio) for _ in range(num_phi))

    def lookup(self, tokens: Tensor) -> Tensor:
        """Look up the code vectors of tokens: (...) int64 -> (..., C)."""
        return F.embedding(tokens, self.codebook)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Find the nearest code by Euclidean distance, Q of Algorithm 1: (..., C) -> (...) int64."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors, codebook = vectors.float(), self.codebook.float()
            # |v - z|^2 without |v|^2, which is the same for every code
            distances = codebook.square().sum(dim=1) - 2 * vectors @ codebook.T  # (..., V)
        return distances.argmin(dim=-1)

    def embed_scale(self, tokens: Tensor, k: int) -> Tensor:
        """Compute what scale k adds to f_hat, phi_k(upsample(lookup(Z, r_k))): tokens (B, p_k^2) -> (B, C, h, w)."""
        return self.embed_vectors(self.lookup(tokens), k)

    def embed_vectors(self, vectors: Tensor, k: int) -> Tensor:
        """Compute `embed_scale` of code vectors, or of mixtures of them: (B, p_k^2, C) -> (B, C, h, w)."""
        side = self.scales.patch_nums[k]
        z = vectors.transpose(1, 2).unflatten(2, (side, side))  # (B, C, p_k, p_k)
        with torch.autocast(z.device.type, enabled=False):
            return self.phi[self.phi_of_scale[k]](self._upsample(z))  # (B, C, h, w)

    def downsample(self, f: Tensor, side: int) -> Tensor:
        """Interpolate a feature map by area: (B, C, h, w) -> (B, C, side, side), the map itself at the last scale."""
        return f if side == self.scales.side else F.interpolate(f, size=(side, side), mode="area")

    def _upsample(self, z: Tensor) -> Tensor:
        side = self.scales.side
        return z if z.shape[-1] == side else F.interpolate(z, size=(side, side), mode="bicubic")

    def _residual_steps(self, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for every scale its tokens (B, p_k^2) and what they add to f_hat (B, C, h, w) (Algorithm 1).

        The search follows no gradient; what the tokens add carries that of codebook and phi.
        """
        self._check_feature_map(f)
        residual = f.detach()  # (B, C, h, w)
        for k, side in enumerate(self.scales.patch_nums):
            vectors = self.downsample(residual, side).flatten(2).transpose(1, 2)  # (B, p_k^2, C)
            tokens = self.nearest(vectors)  # (B, p_k^2)
            embedded = self.embed_scale(tokens, k)  # (B, C, h, w)
            residual = residual - embedded.detach()
            yield tokens, embedded

    def _check_feature_map(self, f: Tensor) -> None:
        wanted = (self.config.code_width, self.scales.side, self.scales.side)
        if f.ndim != 4 or tuple(f.shape[1:]) != wanted:
            raise ValueError(f"feature map has shape {tuple(f.shape)}, expected (batch, *{wanted})")

    def forward(self, f: Tensor) -> Quantized:
        """Quantise for training. f: (B, C, h, w).

        The quantisation loss is taken on the running f_hat after every scale and averaged over scales, so that coarse
        scales are trained to be useful alone (public code; eq. 5 writes it once, for the final f_hat).
        """
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            f_hat, loss, token_maps = torch.zeros_like(f), f.new_zeros(()), []
            for tokens, embedded in self._residual_steps(f):
                f_hat = f_hat + embedded  # (B, C, h, w)
                loss = loss + self.config.beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, f.detach())
                token_maps.append(tokens)
            straight_through = f + (f_hat - f).detach()
        return Quantized(straight_through, self.scales.join(token_maps), loss / self.scales.num_scales)

    @torch.no_grad()
    def encode(self, f: Tensor) -> Tensor:
        """Quantise a feature map, coarse to fine (Algorithm 1): (B, C, h, w) -> codes (B, L) int64."""
        with torch.autocast(f.device.type, enabled=False):
            return self.scales.join([tokens for tokens, _ in self._residual_steps(f.float())])

    def decode(self, codes: Tensor) -> Tensor:
        """Rebuild the feature map from all scales (Algorithm 2): codes (B, L) -> f_hat (B, C, h, w)."""
        *_, f_hat = self._running_f_hat(codes)
        return f_hat

    def _running_f_hat(self, codes: Tensor) -> Iterator[Tensor]:
        """Yield f_hat after every scale, K maps of (B, C, h, w)."""
        f_hat = self.empty_f_hat(codes.shape[0])
        for k, tokens in enumerate(self.scales.split(codes)):
            f_hat = f_hat + self.embed_scale(tokens, k)
            yield f_hat

    def empty_f_hat(self, batch: int) -> Tensor:
        """Return f_hat before the first scale: zeros (B, C, h, w)."""
        return self.codebook.new_zeros(batch, self.config.code_width, self.scales.side, self.scales.side)

    def next_input(self, f_hat: Tensor, k: int) -> Tensor:
        """Make the transformer's input for scale k from f_hat of the scales before: (B, C, h, w) -> (B, p_k^2, C)."""
        return self.downsample(f_hat, self.scales.patch_nums[k]).flatten(2).transpose(1, 2)

    def teacher_forcing_inputs(self, codes: Tensor) -> Tensor:
        """Make the transformer's inputs for scales 2 .. K from the true codes: (B, L) -> (B, L - p_1^2, C).

        The first scale has no input here: its start token comes from the class.
        """
        inputs = [codes.new_zeros(codes.shape[0], 0, self.config.code_width, dtype=self.codebook.dtype)]
        for k, f_hat in zip(range(1, self.scales.num_scales), self._running_f_hat(codes)):
            inputs.append(self.next_input(f_hat, k))
        return torch.cat(inputs, dim=1)
