"""The convolutional encoder and decoder of VQGAN, which VAR keeps unchanged (Sec. 4, "VAR tokenizer").

Encoder: images to feature maps of `code_width` channels, `downsampling` times smaller. Decoder: the way back.
Quantisation and the two 3x3 convolutions around it live in vqvae.py. Initial values are PyTorch's defaults.

Shapes: B batch, H, W image sides, h, w feature map sides, C code width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_GROUPS = 32
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of encoder and decoder. The defaults are the paper's: 16x downsampling."""

    width: int = 160  # channels at full resolution
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level, in units of width; each level halves
    num_res_blocks: int = 2  # per level of the encoder; the decoder has one more
    code_width: int = 32  # C, channels of the feature map

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if self.width < 1 or self.width % NORM_GROUPS:
            raise ValueError(f"width {self.width} is not a positive multiple of {NORM_GROUPS}, the groups of GroupNorm")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers {self.multipliers} must hold at least one level, each 1 or more")
        if self.num_res_blocks < 1 or self.code_width < 1:
            raise ValueError(f"num_res_blocks {self.num_res_blocks} and code_width {self.code_width} must be 1 or more")

    @property
    def downsampling(self) -> int:
        """Side of an image divided by the side of its feature map."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def level_widths(self) -> tuple[int, ...]:
        """The channels of each level, from full resolution to the lowest."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)


def group_norm(width: int) -> nn.GroupNorm:
    """Make the normalisation of `width` channels that VQGAN uses."""
    return nn.GroupNorm(NORM_GROUPS, width, eps=1e-6)


def conv3x3(in_width: int, out_width: int) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps the sides."""
    return nn.Conv2d(in_width, out_width, kernel_size=3, padding=1)


def silu(x: Tensor) -> Tensor:
    """Apply SiLU to a tensor that nobody uses afterwards: without gradients it is overwritten, which saves memory."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: (B, in_width, h, w) -> (B, out_width, h, w)."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_width)
        self.conv1 = conv3x3(in_width, out_width)
        self.norm2 = group_norm(out_width)
        self.conv2 = conv3x3(out_width, out_width)
        self.nin_shortcut = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return h.add_(self.nin_shortcut(x))  # a convolution's gradient does not need its result


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map: (B, width, h, w) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.qkv = nn.Conv2d(width, 3 * width, kernel_size=1)
        self.proj_out = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._queries_keys_values(x)  # (B, 1, h*w, width)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, width)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))

    def scores(self, x: Tensor) -> Tensor:
        """Return the weights with which `forward` mixes values: (B, width, h, w) -> (B, h*w, h*w), rows sum to 1."""
        q, k, _ = self._queries_keys_values(x)
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1).squeeze(1)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h*w, 3*width)
        return qkv.unsqueeze(1).chunk(3, dim=-1)  # each (B, 1, h*w, width)


class Downsample(nn.Module):
    """Halve the sides. Pads right and bottom only, as VQGAN does, so that sides halve exactly without a left pad."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides by nearest neighbour, then convolve."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, width)
        self.register_buffer("folded", None, persistent=False)

    def fold(self) -> None:
        """Replace both steps by one transposed convolution, with 4 products a pixel instead of 9.

        Each pixel of the smaller map stands for four equal ones, whose weights are added up beforehand. Call it when
        the weights change no more. Results differ from the plain ones by rounding.
        """
        assert self.conv.weight.dtype.itemsize >= 4, "folding weights in low precision rounds them twice"
        self.folded = folded_kernel(self.conv.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.folded is not None:
            return F.conv_transpose2d(x, self.folded, self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def folded_kernel(kernel: Tensor) -> Tensor:
    """Make the kernel of stride 2 that doubles the sides and convolves at once: (out, in, 3, 3) -> (in, out, 4, 4).

    A pixel of the smaller map stands for four equal pixels; its contribution is the sum of theirs.
    """
    reach = F.pad(kernel.transpose(0, 1).flip(-1, -2), (0, 1, 0, 1))  # what the top left pixel of the four reaches
    return reach + reach.roll(1, 2) + reach.roll(1, 3) + reach.roll((1, 1), (2, 3))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, in_width: int, out_width: int, *, num_blocks: int, has_attention: bool) -> None:
        super().__init__()
        in_widths = [in_width] + [out_width] * (num_blocks - 1)
        self.block = nn.ModuleList(ResBlock(width, out_width) for width in in_widths)
        self.attn = nn.ModuleList(SpatialAttention(out_width) for _ in range(num_blocks if has_attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class DownLevel(Level):
    """A level of the encoder: blocks, then half the sides (not at the lowest resolution)."""

    def __init__(self, in_width: int, out_width: int, *, num_blocks: int, is_lowest: bool) -> None:
        super().__init__(in_width, out_width, num_blocks=num_blocks, has_attention=is_lowest)
        self.downsample = nn.Identity() if is_lowest else Downsample(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class UpLevel(Level):
    """A level of the decoder: blocks, then twice the sides (not at full resolution)."""

    def __init__(self, in_width: int, out_width: int, *, num_blocks: int, is_lowest: bool, is_highest: bool) -> None:
        super().__init__(in_width, out_width, num_blocks=num_blocks, has_attention=is_lowest)
        self.upsample = nn.Identity() if is_highest else Upsample(out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = SpatialAttention(width)
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))

    def scores(self, x: Tensor) -> Tensor:
        """Return the weights of the attention: (B, width, h, w) -> (B, h*w, h*w), rows sum to 1."""
        return self.attn_1.scores(self.block_1(x))


class Encoder(nn.Module):
    """E of Algorithm 1, before the quantiser's convolution: images (B, 3, H, W) -> (B, C, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        out_widths = config.level_widths
        in_widths = (config.width, *out_widths[:-1])
        lowest = len(out_widths) - 1
        self.conv_in = conv3x3(IMAGE_CHANNELS, config.width)
        self.down = nn.ModuleList(
            DownLevel(in_width, out_width, num_blocks=config.num_res_blocks, is_lowest=i == lowest)
            for i, (in_width, out_width) in enumerate(zip(in_widths, out_widths))
        )
        self.mid = Middle(out_widths[-1])
        self.norm_out = group_norm(out_widths[-1])
        self.conv_out = conv3x3(out_widths[-1], config.code_width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.mid(self._lowest(images))  # (B, level_widths[-1], h, w)
        return self.conv_out(silu(self.norm_out(x)))  # (B, C, h, w)

    def attention_map(self, images: Tensor) -> Tensor:
        """Return the weights of the last attention: images (B, 3, H, W) -> (B, h*w, h*w), rows sum to 1 (Fig. 9)."""
        return self.mid.scores(self._lowest(images))

    def _lowest(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)  # (B, width, H, W)
        for level in self.down:
            x = level(x)
        return x  # (B, level_widths[-1], h, w)


class Decoder(nn.Module):
    """D of Algorithm 2, after the quantiser's convolution: (B, C, h, w) -> images (B, 3, H, W), not clamped."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        out_widths = config.level_widths
        in_widths = (*out_widths[1:], out_widths[-1])
        lowest = len(out_widths) - 1
        self.conv_in = conv3x3(config.code_width, out_widths[-1])
        self.mid = Middle(out_widths[-1])
        self.up = nn.ModuleList(  # counted from full resolution, run from the last to the first
            UpLevel(in_width, out_width, num_blocks=config.num_res_blocks + 1, is_lowest=i == lowest, is_highest=i == 0)
            for i, (in_width, out_width) in enumerate(zip(in_widths, out_widths))
        )
        self.norm_out = group_norm(out_widths[0])
        self.conv_out = conv3x3(out_widths[0], IMAGE_CHANNELS)

    @property
    def last_layer(self) -> Tensor:
        """The weight at which the adaptive weight of the adversarial term compares gradients (VQGAN, eq. 7)."""
        return self.conv_out.weight

    def fold_upsampling(self) -> None:
        """Fold every upsampling into its convolution, see `Upsample.fold`."""
        for level in self.up:
            if isinstance(level.upsample, Upsample):
                level.upsample.fold()

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features))  # (B, level_widths[-1], h, w)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))  # (B, 3, H, W)
