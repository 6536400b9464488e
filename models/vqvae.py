"""The VAR tokenizer: images to codes and back, and the reconstruction forward on which stage 1 trains (Fig. 4, left).

The losses other than the quantisation loss are the training loop's. `encode`, `decode` and `teacher_forcing_inputs`
serve stage 2 and sampling, where the tokenizer is frozen, and keep no gradients; `features` and `forward` are
differentiable.

Shapes: B batch, H = W image side, h = w = p_K feature map side, C code width, L tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.autoencoder import IMAGE_CHANNELS, AutoencoderConfig, Decoder, Encoder
from models.quantizer import MultiScaleQuantizer, QuantizerConfig
from models.scales import PATCH_NUMS_256, Scales


@dataclass(frozen=True)
class VQVAEConfig:
    """The tokenizer. The defaults are the paper's at 256 px."""

    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", Scales(self.patch_nums).patch_nums)
        if self.autoencoder.code_width != self.quantizer.code_width:
            raise ValueError(
                f"autoencoder.code_width {self.autoencoder.code_width} differs from quantizer.code_width "
                f"{self.quantizer.code_width}"
            )

    @property
    def scales(self) -> Scales:
        """The schedule of token maps."""
        return Scales(self.patch_nums)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.autoencoder.downsampling * self.scales.side


@dataclass(frozen=True)
class Reconstruction:
    """What the training forward gives."""

    images: Tensor  # (B, 3, H, W), not clamped
    codes: Tensor  # (B, L) int64
    quantization_loss: Tensor  # ()


MAX_PIXELS_DECODED = 2**20  # at once: 16 images at 256 px


class VQVAE(nn.Module):
    """Encoder, multi-scale quantiser and decoder, with a 3x3 convolution on either side of the quantiser.

    Initial weights are PyTorch's defaults from its global generator: call torch.manual_seed before.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        code_width = config.quantizer.code_width
        self.config = config
        self.scales = config.scales
        self.encoder = Encoder(config.autoencoder)
        self.quant_conv = nn.Conv2d(code_width, code_width, kernel_size=3, padding=1)
        self.quantizer = MultiScaleQuantizer(config.quantizer, config.scales)
        self.post_quant_conv = nn.Conv2d(code_width, code_width, kernel_size=3, padding=1)
        self.decoder = Decoder(config.autoencoder)

    def features(self, images: Tensor) -> Tensor:
        """Compute the feature map f that is quantised: images (B, 3, H, W) in [-1, 1] -> (B, C, h, w)."""
        self._check_shape(images)
        return self.quant_conv(self.encoder(images))

    def _check_shape(self, images: Tensor) -> None:
        wanted = (IMAGE_CHANNELS, self.config.image_size, self.config.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (batch, *{wanted})")

    def forward(self, images: Tensor) -> Reconstruction:
        """Encode, quantise straight-through, decode: images (B, 3, H, W) in [-1, 1]."""
        quantized = self.quantizer(self.features(images))
        return Reconstruction(self._decode_features(quantized.f_hat), quantized.codes, quantized.loss)

    def _decode_features(self, f_hat: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(f_hat))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to codes (B, L) int64 (Algorithm 1)."""
        return self.quantizer.encode(self.features(images))

    def prepare_decoder(self, dtype: torch.dtype = torch.float32) -> None:
        """Make `decode` fast once the weights change no more: channels-last, upsampling folded, in `dtype`.

        Images differ from the plain ones by rounding: with initial weights in float32 by less than 1e-4 of [-1, 1], in
        bfloat16 by one of 256 grey levels on average and by up to 8. The encoder and the quantiser do not change. A
        decoder in 16 bit cannot be prepared again: folding would round its weights twice.
        """
        self.decoder.fold_upsampling()
        for module in (self.post_quant_conv, self.decoder):
            module.eval().requires_grad_(False).to(dtype)
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch does not declare it

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes (B, L) to images (B, 3, H, W) float32 clamped to [-1, 1] (Algorithm 2)."""
        return self.decode_features(self.quantizer.decode(codes))

    @torch.no_grad()
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """Decode feature maps (B, C, h, w) to images (B, 3, H, W) float32 clamped to [-1, 1], a few at a time."""
        together = max(1, MAX_PIXELS_DECODED // self.config.image_size**2)
        parts = f_hat.to(self.post_quant_conv.weight.dtype).split(together)
        return torch.cat([self._decode_features(part).float().clamp_(-1, 1) for part in parts])

    @torch.no_grad()
    def teacher_forcing_inputs(self, codes: Tensor) -> Tensor:
        """Make the transformer's inputs for scales 2 .. K: codes (B, L) -> (B, L - p_1^2, C) float32."""
        return self.quantizer.teacher_forcing_inputs(codes)

    @torch.no_grad()
    def token_dependency(self, images: Tensor) -> Tensor:
        """Measure how much each token of the feature map depends on each other one (Fig. 9, appendix A).

        images (B, 3, H, W) in [-1, 1] -> (B, h*w, h*w), in raster order: row i is the attention of token i and sums
        to 1.
        """
        self._check_shape(images)
        return self.encoder.attention_map(images)
