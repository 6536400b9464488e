"""The Inception V3 of 2015 whose features FID, sFID and IS are defined on: TensorFlow's graph, in torch.

It differs from torchvision's network: images are resized by TensorFlow 1's bilinear rule, averages in pools leave the
padding out, the last block pools by maximum, and the classifier has 1,008 outputs. The layers carry the names of
torch-fidelity's weights (pt_inception-2015-12-05), so those load as they are.

Shapes: B batch, H, W image sides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
FEATURES, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7  # of 17 x 17 each: the features of sFID

Kernel = int | tuple[int, int]
Conv = tuple[str, int, Kernel]  # name, output channels, kernel
Branch = tuple[Conv | tuple[Conv, Conv], ...]  # one after another; a pair is two convolutions side by side


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, ReLU. Stride 1 keeps the sides unless `pads` is false."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, *, stride: int = 1, pads: bool = True) -> None:
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if pads and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, (rows, columns), stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to `outputs` channels."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels joined, and a pool as the last of them."""

    def __init__(
        self, inputs: int, branches: tuple[Branch, ...], *, pool: int = 0, pool_is_max: bool = False, stride: int = 1
    ) -> None:
        """pool: channels of the convolution after the pool; 0 for none. stride: of the pool and last convolutions."""
        super().__init__()
        self.branches = branches
        self.stride = stride
        self.pool_is_max = pool_is_max
        for branch in branches:
            width = inputs
            for step in branch:
                fork = step if isinstance(step[0], tuple) else (step,)
                for name, outputs, kernel in fork:
                    self.add_module(name, ConvNorm(width, outputs, kernel, stride=stride if step is branch[-1] else 1))
                width = sum(outputs for _, outputs, _ in fork)
        if pool:
            self.branch_pool = ConvNorm(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to the branches' channels, at 1 / stride of the sides."""
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                fork = step if isinstance(step[0], tuple) else (step,)
                y = torch.cat([self.get_submodule(name)(y) for name, _, _ in fork], 1)
            outputs.append(y)
        if self.stride > 1:
            return torch.cat([*outputs, F.max_pool2d(x, 3, stride=self.stride)], 1)
        if self.pool_is_max:
            pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


def mixed_5(inputs: int, pool: int) -> Mixed:
    """Return a block of the 35 x 35 maps."""
    five: Branch = (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5))
    three: Branch = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return Mixed(inputs, ((("branch1x1", 64, 1),), five, three), pool=pool)


def mixed_6(width: int) -> Mixed:
    """Return a block of the 17 x 17 maps, whose 7 x 7 kernels are taken apart into rows and columns."""
    short: Branch = (("branch7x7_1", width, 1), ("branch7x7_2", width, (1, 7)), ("branch7x7_3", 192, (7, 1)))
    long: Branch = (
        ("branch7x7dbl_1", width, 1),
        *((f"branch7x7dbl_{i}", width, (7, 1) if i % 2 == 0 else (1, 7)) for i in (2, 3, 4)),
        ("branch7x7dbl_5", 192, (1, 7)),
    )
    return Mixed(768, ((("branch1x1", 192, 1),), short, long), pool=192)


def mixed_7(inputs: int, *, pool_is_max: bool) -> Mixed:
    """Return a block of the 8 x 8 maps, whose branches fork into a row and a column kernel."""

    def fork(name: str) -> tuple[Conv, Conv]:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    three: Branch = (("branch3x3_1", 384, 1), fork("branch3x3_2"))
    double: Branch = (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3"))
    return Mixed(inputs, ((("branch1x1", 320, 1),), three, double), pool=192, pool_is_max=pool_is_max)


class InceptionV3(nn.Module):
    """The network in evaluation mode; nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pads=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pads=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        double: Branch = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
        self.Mixed_6a = Mixed(288, ((("branch3x3", 384, 3),), double), stride=2)
        self.Mixed_6b, self.Mixed_6c = mixed_6(128), mixed_6(160)
        self.Mixed_6d, self.Mixed_6e = mixed_6(160), mixed_6(192)
        three: Branch = (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3))
        seven: Branch = (
            *(("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))),
            ("branch7x7x3_4", 192, 3),
        )
        self.Mixed_7a = Mixed(768, (three, seven), stride=2)
        self.Mixed_7b = mixed_7(1280, pool_is_max=False)
        self.Mixed_7c = mixed_7(2048, pool_is_max=True)
        self.fc = nn.Linear(FEATURES, CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images (B, 3, H, W) uint8 to what the three measures are taken of.

        Returns:
            features (B, 2048) of FID, precision and recall; logits (B, 1008) of IS, without the bias; spatial features
            (B, 2023) of sFID: seven channels of Mixed_6d's first branch, rows and columns before channels.
        """
        x = (tensorflow_resize(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6d(x)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(x))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))
        return features, features @ self.fc.weight.T, spatial


def tensorflow_resize(images: Tensor, side: int) -> Tensor:
    """Resize images (B, C, H, W) to (B, C, side, side) as TensorFlow 1's resize_bilinear does with its defaults.

    Pixel i of the result lies at i * H / side of the image, not at pixel centres, and nothing is smoothed first.
    """
    for dim in (3, 2):
        length = images.shape[dim]
        place = torch.arange(side, dtype=torch.float32, device=images.device) * (length / side)
        low = place.long()
        share = (place - low).to(images.dtype)
        share = share if dim == 3 else share[:, None]
        first = images.index_select(dim, low)
        images = first + (images.index_select(dim, (low + 1).clamp_max(length - 1)) - first) * share
    return images
