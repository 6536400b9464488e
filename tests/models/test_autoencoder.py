"""The convolutional encoder and decoder."""

import pytest
import torch
from torch import nn

from models.autoencoder import AutoencoderConfig, Decoder, Downsample, Encoder, ResBlock, SpatialAttention, Upsample

CONFIG = AutoencoderConfig(width=32, multipliers=(1, 2, 2), num_res_blocks=1, code_width=6)


def test_the_encoder_divides_sides_by_downsampling_and_the_decoder_restores_them() -> None:
    images = torch.randn(2, 3, 16, 16)
    features = Encoder(CONFIG)(images)
    assert CONFIG.downsampling == 4
    assert features.shape == (2, 6, 4, 4)
    assert Decoder(CONFIG)(features).shape == images.shape


def test_attention_stands_at_the_lowest_resolution_and_in_the_middle_only() -> None:
    encoder, decoder = Encoder(CONFIG), Decoder(CONFIG)
    attentions = {name for name, module in encoder.named_modules() if isinstance(module, SpatialAttention)}
    assert attentions == {"down.2.attn.0", "mid.attn_1"}
    attentions = {name for name, module in decoder.named_modules() if isinstance(module, SpatialAttention)}
    assert attentions == {"up.2.attn.0", "up.2.attn.1", "mid.attn_1"}


def test_downsampling_pads_on_the_right_and_bottom_only() -> None:
    downsample = Downsample(1)
    nn.init.zeros_(downsample.conv.weight)
    nn.init.zeros_(downsample.conv.bias)
    downsample.conv.weight.data[0, 0, 0, 0] = 1  # picks the top left of each window
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(downsample(x), x[:, :, ::2, ::2])


def test_the_scores_times_the_values_are_what_attention_adds() -> None:
    attention, x = SpatialAttention(32), torch.randn(2, 32, 3, 5)
    scores = attention.scores(x)
    assert scores.shape == (2, 15, 15)
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(2, 15))
    values = attention.qkv(attention.norm(x)).flatten(2).chunk(3, dim=1)[2]  # (B, C, h*w)
    mixed = (scores @ values.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), x + attention.proj_out(mixed))


def test_the_attention_map_of_an_encoder_is_that_of_its_last_attention() -> None:
    encoder, images, seen = Encoder(CONFIG), torch.randn(2, 3, 16, 16), []
    hook = encoder.mid.attn_1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder(images)
    hook.remove()
    assert torch.equal(encoder.attention_map(images), encoder.mid.attn_1.scores(seen[0]))
    assert encoder.attention_map(images).shape == (2, 16, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 48}, "width 48"),
        ({"multipliers": ()}, "multipliers"),
        ({"num_res_blocks": 0}, "num_res_blocks 0"),
    ],
)
def test_an_impossible_shape_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**change)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_folded_upsampling_is_nearest_neighbour_and_a_convolution(side: int) -> None:
    upsample, x = Upsample(6).double(), torch.randn(2, 6, side, side, dtype=torch.float64)
    plain = upsample(x)
    upsample.fold()
    torch.testing.assert_close(upsample(x), plain)
    assert set(upsample.state_dict()) == {"conv.weight", "conv.bias"}


def test_a_block_gives_the_same_with_gradients_and_without_and_leaves_its_input_alone() -> None:
    """Without gradients it works in place."""
    block, x = ResBlock(32, 32), torch.randn(2, 32, 4, 4)
    before = x.clone()
    with torch.no_grad():
        without = block(x)
    assert torch.equal(without, block(x)) and torch.equal(x, before)


def test_gradients_of_a_block_are_those_of_its_formula() -> None:
    """Its sum is taken in place."""
    block, x = ResBlock(32, 64).double(), torch.randn(1, 32, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x).sum(), x)
