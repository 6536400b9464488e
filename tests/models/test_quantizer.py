"""Multi-scale quantisation: Algorithms 1 and 2, and the inputs of the next scale."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.quantizer import MultiScaleQuantizer, Phi, QuantizerConfig, phi_indices
from models.scales import Scales

SCALES = Scales((1, 2, 3, 4))
CONFIG = QuantizerConfig(vocab_size=32, code_width=6, num_phi=2)
EXACT = {"rtol": 0, "atol": 1e-5}  # float32 sums of K = 4 maps with entries of order 1, in another order


@pytest.fixture
def quantizer() -> MultiScaleQuantizer:
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(CONFIG, SCALES)
    quantizer.codebook.data.normal_()  # far apart, so that no search is a tie
    return quantizer


@pytest.fixture
def f() -> Tensor:
    return torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(1))


def public_phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """The rule as published, in numpy, whose rounding decides ties."""
    first = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    points = np.linspace(first, 1 - first, num_phi)
    return tuple(int(np.argmin(np.abs(points - k / (num_scales - 1)))) for k in range(num_scales))


def test_phi_sharing_of_the_released_tokenizers() -> None:
    assert phi_indices(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert phi_indices(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)


@pytest.mark.parametrize("num_phi", range(2, 11))
def test_phi_sharing_equals_the_public_rule_in_numpy(num_phi: int) -> None:
    for num_scales in range(2, 17):
        assert phi_indices(num_scales, num_phi) == public_phi_indices(num_scales, num_phi)


def test_phi_can_be_one_per_scale_or_one_for_all() -> None:
    assert phi_indices(5, 0) == (0, 1, 2, 3, 4)
    assert phi_indices(5, 1) == (0, 0, 0, 0, 0)
    assert phi_indices(1, 4) == (0,)
    assert len(MultiScaleQuantizer(QuantizerConfig(8, 6, num_phi=0), SCALES).phi) == 4


def test_nearest_is_the_code_of_least_distance(quantizer: MultiScaleQuantizer) -> None:
    vectors = torch.randn(5, 7, 6)
    assert torch.equal(
        quantizer.nearest(vectors), torch.cdist(vectors.flatten(0, 1), quantizer.codebook).argmin(dim=1).reshape(5, 7)
    )
    assert torch.equal(quantizer.nearest(quantizer.codebook), torch.arange(32))


def test_f_hat_is_the_sum_of_the_embedded_scales_and_f_is_f_hat_plus_the_last_residual(
    quantizer: MultiScaleQuantizer, f: Tensor
) -> None:
    codes = quantizer.encode(f)
    residual = f
    for k, tokens in enumerate(SCALES.split(codes)):
        vectors = F.interpolate(residual, size=(SCALES.patch_nums[k],) * 2, mode="area").flatten(2).transpose(1, 2)
        assert torch.equal(quantizer.nearest(vectors), tokens)
        residual = residual - quantizer.embed_scale(tokens, k)
    f_hat = quantizer.decode(codes)
    embedded = [quantizer.embed_scale(tokens, k) for k, tokens in enumerate(SCALES.split(codes))]
    torch.testing.assert_close(f_hat, sum(embedded), **EXACT)
    torch.testing.assert_close(f_hat + residual, f, **EXACT)


def test_training_and_encoding_choose_the_same_codes_and_f_hat(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    quantized = quantizer(f)
    assert torch.equal(quantized.codes, quantizer.encode(f))
    torch.testing.assert_close(quantized.f_hat, quantizer.decode(quantized.codes), **EXACT)


def test_codes_of_a_scale_depend_on_earlier_scales_only(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    longer = MultiScaleQuantizer(QuantizerConfig(32, 6, num_phi=1), SCALES)
    shorter = MultiScaleQuantizer(QuantizerConfig(32, 6, num_phi=1), Scales((1, 2, 4)))
    longer.codebook.data.copy_(quantizer.codebook)
    shorter.load_state_dict(longer.state_dict())
    assert torch.equal(longer.encode(f)[:, :5], shorter.encode(f)[:, :5])  # scales 1 and 2 lie before the difference


def test_changing_a_scale_changes_inputs_of_later_scales_only(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    codes = quantizer.encode(f)
    changed = codes.clone()
    changed[:, SCALES.slices[2]] = (changed[:, SCALES.slices[2]] + 1) % 32
    inputs, changed_inputs = quantizer.teacher_forcing_inputs(codes), quantizer.teacher_forcing_inputs(changed)
    first_of_scale_4 = SCALES.slices[3].start - SCALES.first_tokens
    assert torch.equal(inputs[:, :first_of_scale_4], changed_inputs[:, :first_of_scale_4])
    assert not torch.equal(inputs[:, first_of_scale_4:], changed_inputs[:, first_of_scale_4:])


def test_teacher_forcing_inputs_are_the_running_f_hat_at_the_next_side(
    quantizer: MultiScaleQuantizer, f: Tensor
) -> None:
    codes = quantizer.encode(f)
    inputs = quantizer.teacher_forcing_inputs(codes)
    assert inputs.shape == (3, SCALES.num_tokens - SCALES.first_tokens, 6)
    f_hat, wanted = torch.zeros_like(f), []
    for k, tokens in enumerate(SCALES.split(codes)[:-1]):
        f_hat = f_hat + quantizer.embed_scale(tokens, k)
        side = SCALES.patch_nums[k + 1]
        wanted.append(F.adaptive_avg_pool2d(f_hat, side).flatten(2).transpose(1, 2))
    torch.testing.assert_close(inputs, torch.cat(wanted, dim=1), **EXACT)


def test_a_single_scale_has_no_teacher_forcing_inputs() -> None:
    quantizer = MultiScaleQuantizer(CONFIG, Scales((4,)))
    assert quantizer.teacher_forcing_inputs(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 0, 6)


def test_the_straight_through_gradient_of_f_hat_is_that_of_f(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    f.requires_grad_()
    weight = torch.randn_like(f)
    (quantizer(f).f_hat * weight).sum().backward()
    assert torch.equal(f.grad, weight)
    assert quantizer.codebook.grad is None  # codebook and phi learn from the quantisation loss


def test_the_loss_is_the_mean_over_scales_of_the_running_error(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    quantized = quantizer(f)
    f_hat, loss = torch.zeros_like(f), 0.0
    for k, tokens in enumerate(SCALES.split(quantized.codes)):
        f_hat = f_hat + quantizer.embed_scale(tokens, k)
        loss += (1 + CONFIG.beta) * (f_hat - f).square().mean() / SCALES.num_scales
    torch.testing.assert_close(quantized.loss, loss)


def loss_gradients(beta: float, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the quantisation loss with respect to f and to the codebook, and the sum of f - f_hat of scales."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(QuantizerConfig(vocab_size=32, code_width=6, num_phi=2, beta=beta), SCALES)
    quantizer.codebook.data.normal_()
    f = f.clone().requires_grad_()
    quantized = quantizer(f)
    of_f, of_codebook = torch.autograd.grad(quantized.loss, (f, quantizer.codebook))
    f_hat, errors = torch.zeros_like(f), torch.zeros_like(f)
    for k, tokens in enumerate(SCALES.split(quantized.codes)):
        f_hat = f_hat + quantizer.embed_scale(tokens, k)
        errors = errors + f - f_hat
    return of_f, of_codebook, errors.detach()


def test_beta_weighs_what_pulls_f_and_the_codebook_is_pulled_with_weight_1(f: Tensor) -> None:
    of_f, of_codebook, errors = loss_gradients(0.1, f)
    torch.testing.assert_close(of_f, 2 * 0.1 * errors / f.numel() / SCALES.num_scales)  # of mean squares, over scales
    torch.testing.assert_close(of_codebook, loss_gradients(0.0, f)[1])  # where the codebook's term is the whole loss
    assert of_codebook.abs().sum() > 0


def test_phi_mixes_its_input_with_the_share_ratio_of_the_convolution() -> None:
    phi, x = Phi(6, ratio=0.2), torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(phi(x), 0.8 * x + 0.2 * phi.conv(x))


def test_the_loss_reaches_feature_map_codebook_and_phi(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    f.requires_grad_()
    quantizer(f).loss.backward()
    tensors = [f, quantizer.codebook, *(phi.conv.weight for phi in quantizer.phi)]
    assert all(tensor.grad.abs().sum() > 0 for tensor in tensors)


def test_once_trained_every_scale_brings_f_hat_nearer_to_f(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        quantizer(f).loss.backward()
        optimizer.step()
    f_hat, errors = torch.zeros_like(f), [f.square().mean().item()]
    for k, tokens in enumerate(SCALES.split(quantizer.encode(f))):
        f_hat = f_hat + quantizer.embed_scale(tokens, k)
        errors.append((f_hat - f).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_autocast_changes_no_code(quantizer: MultiScaleQuantizer, f: Tensor) -> None:
    codes = quantizer.encode(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.encode(f), codes)
        assert torch.equal(quantizer(f).codes, codes)


def test_other_shapes_are_refused(quantizer: MultiScaleQuantizer) -> None:
    with pytest.raises(ValueError, match=r"\(1, 6, 5, 5\)"):
        quantizer.encode(torch.zeros(1, 6, 5, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 1}, "vocab_size 1"),
        ({"num_phi": -1}, "num_phi -1"),
        ({"phi_ratio": 1.5}, "phi_ratio 1.5"),
        ({"beta": -0.1}, "beta -0.1"),
    ],
)
def test_an_impossible_quantizer_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**change)
