"""The tokenizer: images to codes and back."""

import pytest
import torch

from models import vqvae
from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.vqvae import VQVAE, VQVAEConfig

CONFIG = VQVAEConfig(
    patch_nums=(1, 2, 4),
    autoencoder=AutoencoderConfig(width=32, multipliers=(1, 1, 2), num_res_blocks=1, code_width=4),
    quantizer=QuantizerConfig(vocab_size=16, code_width=4, num_phi=0),
)


@pytest.fixture(scope="module")
def tokenizer() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(CONFIG)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_training_forward_reconstructs_what_decode_gives(tokenizer: VQVAE, images: torch.Tensor) -> None:
    reconstruction = tokenizer(images)
    assert torch.equal(reconstruction.codes, tokenizer.encode(images))
    # 1e-4: the straight-through sum f + (f_hat - f) rounds, and the decoder amplifies it
    clamped, decoded = reconstruction.images.clamp(-1, 1), tokenizer.decode(reconstruction.codes)
    torch.testing.assert_close(clamped, decoded, rtol=0, atol=1e-4)


def test_the_reconstruction_trains_the_encoder_through_the_quantiser(images: torch.Tensor) -> None:
    tokenizer = VQVAE(CONFIG)
    reconstruction = tokenizer(images)
    (reconstruction.images.square().mean() + reconstruction.quantization_loss).backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_what_stage_2_uses_keeps_no_gradients(tokenizer: VQVAE, images: torch.Tensor) -> None:
    codes = tokenizer.encode(images)
    assert not tokenizer.decode(codes).requires_grad
    assert not tokenizer.teacher_forcing_inputs(codes).requires_grad


def test_the_dependency_of_tokens_is_attention_over_the_whole_feature_map(
    tokenizer: VQVAE, images: torch.Tensor
) -> None:
    dependency = tokenizer.token_dependency(images)
    assert dependency.shape == (2, 16, 16) and not dependency.requires_grad
    torch.testing.assert_close(dependency.sum(dim=-1), torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        tokenizer.token_dependency(torch.zeros(1, 3, 32, 32))


def test_images_of_another_size_are_refused(tokenizer: VQVAE) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32))


def test_code_widths_must_agree() -> None:
    with pytest.raises(ValueError, match="code_width 32 differs from quantizer.code_width 8"):
        VQVAEConfig(quantizer=QuantizerConfig(code_width=8))


GREY_LEVEL = 2 / 255  # of images in [-1, 1]


@pytest.mark.parametrize(
    "dtype, most, mean", [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 8 * GREY_LEVEL, 1.5 * GREY_LEVEL)]
)
def test_a_prepared_decoder_gives_the_plain_images_and_encoding_does_not_change(
    images: torch.Tensor, dtype: torch.dtype, most: float, mean: float
) -> None:
    torch.manual_seed(0)
    tokenizer = VQVAE(CONFIG)
    weights = {name: weight.clone() for name, weight in tokenizer.state_dict().items()}
    codes = tokenizer.encode(images)
    plain = tokenizer.decode(codes)
    tokenizer.prepare_decoder(dtype)
    fast = tokenizer.decode(codes)
    assert fast.dtype == torch.float32 and fast.abs().max() <= 1
    assert (fast - plain).abs().max() < most and (fast - plain).abs().mean() < mean  # bfloat16 keeps 8 bits
    assert torch.equal(tokenizer.encode(images), codes)
    assert set(tokenizer.state_dict()) == set(weights)


def test_a_decoder_in_low_precision_is_not_folded_again() -> None:
    tokenizer = VQVAE(CONFIG)
    tokenizer.prepare_decoder()
    tokenizer.prepare_decoder(torch.bfloat16)  # of float32 weights, which are as they were
    with pytest.raises(AssertionError, match="rounds them twice"):
        tokenizer.prepare_decoder(torch.bfloat16)


def test_a_batch_too_large_to_decode_at_once_comes_in_parts(
    tokenizer: VQVAE, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = tokenizer.encode(torch.cat([images, images.flip(3), images[:1]]))
    whole, sizes = tokenizer.decode(codes), []
    monkeypatch.setattr(vqvae, "MAX_PIXELS_DECODED", 2 * 16 * 16)
    handle = tokenizer.decoder.register_forward_hook(lambda module, given, found: sizes.append(len(found)))
    torch.testing.assert_close(tokenizer.decode(codes), whole, rtol=0, atol=1e-4)
    handle.remove()
    assert sizes == [2, 2, 1]
