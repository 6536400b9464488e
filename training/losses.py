"""The losses of both stages, and the numbers that describe them scale by scale.

B batch, L tokens, K scales, V vocabulary, H image side. Stage 1 is eq. 5 of the paper; stage 2 is plain cross-entropy
over all tokens with weight 1/L each, as the public code has it (no label smoothing, no weighting of scales).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.scales import Scales
from training.cross_entropy import token_cross_entropy
from training.engine.distributed import to_device

VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"  # of torchvision's vgg16-397923af.pth


@dataclass(frozen=True)
class TokenScores:
    """Cross-entropy and error of every image at every scale, in float32."""

    loss: Tensor  # (B, K) nats, mean over the tokens of the scale
    error: Tensor  # (B, K) share of tokens whose most likely code is wrong


def token_scores(logits: Tensor, codes: Tensor, scales: Scales) -> TokenScores:
    """Score logits (B, L, V), of any precision, against codes (B, L) int64."""
    loss = token_cross_entropy(logits.flatten(0, 1), codes.flatten()).view_as(codes)  # (B, L)
    error = (logits.argmax(-1) != codes).float()  # (B, L)
    return TokenScores(_mean_per_scale(loss, scales), _mean_per_scale(error, scales))


def _mean_per_scale(values: Tensor, scales: Scales) -> Tensor:
    return torch.stack([part.mean(1) for part in scales.split(values)], dim=1)  # (B, K)


def average_over_tokens(per_scale: Tensor, scales: Scales) -> Tensor:
    """Average means per scale (..., K) over all L tokens: -> (...). Each scale counts with its share of tokens."""
    # to_device, since what is made on a GPU from numbers of the host is waited for
    shares = torch.tensor(scales.scale_sizes, dtype=per_scale.dtype) / scales.num_tokens
    return per_scale @ to_device(shares, per_scale.device)


@dataclass(frozen=True)
class ReconstructionLossConfig:
    """Weights of eq. 5. A weight of 0 switches the term off: nothing is built or computed for it.

    The paper prints no weights. The defaults are those of the authors' single-scale trainer `vaex` (utils/arg_util.py).
    """

    l1_weight: float = 0.2
    l2_weight: float = 1.0
    quantization_weight: float = 1.0
    lpips_weight: float = 1.0
    lpips_backbone: str = ""  # path of vgg16-397923af.pth; empty: torch's own cache folder
    adversarial_weight: float = 0.4
    adversarial_start: float = 0.22  # share of training after which the discriminator's term counts
    adaptive_weight_limit: float = 1e4  # VQGAN's lambda, the ratio of gradient norms at the last layer, is cut here

    def __post_init__(self) -> None:
        for name in ("l1_weight", "l2_weight", "quantization_weight", "lpips_weight", "adversarial_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name} is {getattr(self, name)}; it must be 0 (off) or positive")
        if self.l1_weight + self.l2_weight == 0:
            raise ValueError("loss.l1_weight and loss.l2_weight are both 0; the tokenizer needs a pixel loss")
        if not 0 <= self.adversarial_start <= 1:
            raise ValueError(f"loss.adversarial_start is {self.adversarial_start}; it is a share of the run, in [0, 1]")


def pixel_loss(reconstruction: Tensor, images: Tensor, config: ReconstructionLossConfig) -> Tensor:
    """Compute the weighted sum of mean absolute and mean squared error of (B, 3, H, H) in [-1, 1]: -> ()."""
    return config.l1_weight * F.l1_loss(reconstruction, images) + config.l2_weight * F.mse_loss(reconstruction, images)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the discriminator's side of the hinge loss (VQGAN, eq. 4, in its hinge form): -> ()."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def last_layer_gradients(other_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Compute the gradients of two losses at the last layer, and leave the graph usable: -> (2, *last_layer.shape)."""
    losses = other_loss, adversarial_loss
    return torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in losses])


def adaptive_weight(gradients: Tensor, limit: float) -> Tensor:
    """Compute VQGAN's lambda (eq. 7 there) from `last_layer_gradients`: the ratio of norms, at most `limit`: -> ().

    The gradients are to be those of the whole global batch, averaged; norms of its parts would not add up to them.
    """
    other, adversarial = gradients[0].norm(), gradients[1].norm()
    return (other / (adversarial + 1e-4)).clamp(max=limit).detach()


def load_lpips(backbone: str) -> nn.Module:
    """Load the LPIPS distance (VGG16) of the lpips package, frozen, with ImageNet weights from a local file.

    Raises:
        FileNotFoundError: no weights at `backbone`, nor where torch keeps downloads; a run never downloads them.
        ValueError: the file is not the published one, or lpips does not work with the torchvision here.
    """
    import hashlib
    from pathlib import Path

    name = "vgg16-397923af.pth"
    path = Path(backbone) if backbone else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"LPIPS needs the ImageNet VGG16 weights and found no file {path}; put {name} (528 MiB, from torchvision's "
            "model page) there or set loss.lpips_backbone=PATH, or switch the term off with loss.lpips_weight=0"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != VGG16_SHA256:
        raise ValueError(
            f"{path}: sha256 is {digest[:12]}..., that of the published weights {VGG16_SHA256[:12]}...; fetch it again"
        )
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch fails with RuntimeError
        raise ValueError(
            f"the lpips package cannot be imported ({' '.join(str(error).split())}); install the torchvision that "
            "matches this torch, or switch the term off with loss.lpips_weight=0"
        ) from None
    distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = torch.load(path, map_location="cpu", weights_only=True)  # torch's old format; its bytes are known by now
    _fill_vgg_slices(distance.net, {key.removeprefix("features."): value for key, value in weights.items()})
    return distance.eval().requires_grad_(False)


def _fill_vgg_slices(network: nn.Module, features: dict[str, Tensor]) -> None:
    """Copy VGG's `features` into the slices of lpips, which keep the layers' numbers as names: `slice3.10.weight`."""
    state = network.state_dict()
    network.load_state_dict({key: features[key.split(".", 1)[1]] for key in state})
