"""The discriminator of the adversarial term L_G in eq. 5: the patch discriminator of VQGAN.

It judges overlapping patches, not whole images. The hinge losses and the adaptive weight are the training loop's.

Shapes: B batch, H, W image sides, h, w sides of the map of patches.
"""

import math

import torch
from torch import Tensor, nn

from models.autoencoder import IMAGE_CHANNELS, NORM_GROUPS

MAX_MULTIPLIER = 8  # channels stop growing at 8 x width
MIN_SIDE = 3  # of the map before the last two convolutions, each of which takes one off


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions, then one logit per patch: high for real, low for reconstructed.

    GroupNorm stands where VQGAN has BatchNorm. A sample's logits then depend on that sample alone: batch 1 works, real
    and reconstructed images may share a batch or not, and no running statistics drift apart between processes.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, *, seed: int = 0) -> None:
        """width: channels of the first layer. num_layers: strided layers, so a patch map is 2^num_layers smaller."""
        super().__init__()
        if width < 1 or num_layers < 1:
            raise ValueError(f"width {width} and num_layers {num_layers} must be 1 or more")
        self.num_layers = num_layers
        widths = [width * min(2**i, MAX_MULTIPLIER) for i in range(num_layers + 1)]
        layers = [conv4x4(IMAGE_CHANNELS, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            norm = nn.GroupNorm(math.gcd(NORM_GROUPS, widths[i]), widths[i])
            layers += [conv4x4(widths[i - 1], widths[i], stride=stride), norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, conv4x4(widths[-1], 1, stride=1))
        self.init_weights(torch.Generator("cpu").manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the convolutions from N(0, 0.02), as VQGAN does, on the CPU; biases are 0, norms the identity."""
        for module in self.layers:
            if isinstance(module, nn.Conv2d) and module.bias is not None and not module.weight.is_meta:
                values = torch.empty(module.weight.shape, device="cpu")
                module.weight.copy_(values.normal_(0, 0.02, generator=generator))
                if module.bias is not None:
                    module.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Judge images (B, 3, H, W) in [-1, 1] by patches: -> logits (B, 1, h, w). Raises ValueError if too small."""
        smallest = MIN_SIDE * 2**self.num_layers
        if min(images.shape[-2:]) < smallest:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, num_layers {self.num_layers} needs sides of "
                f"{smallest} or more"
            )
        return self.layers(images)


def conv4x4(in_width: int, out_width: int, *, stride: int) -> nn.Conv2d:
    """Make a 4x4 convolution, which divides the sides by `stride`, less one at stride 1."""
    return nn.Conv2d(in_width, out_width, kernel_size=4, stride=stride, padding=1)
