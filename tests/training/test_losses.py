"""Losses: closed forms, means over tokens and scales, and LPIPS as the lpips package defines it."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision_import import import_torchvision

from models.scales import Scales
from training.losses import (
    VGG16_SHA256,
    ReconstructionLossConfig,
    adaptive_weight,
    average_over_tokens,
    hinge_discriminator_loss,
    last_layer_gradients,
    load_lpips,
    pixel_loss,
    token_scores,
)

SCALES = Scales((1, 2, 3))  # 14 tokens
VOCAB_SIZE = 8
BATCH = 5
VGG_TAPS = (3, 8, 15, 22, 29)  # the last ReLU before each pooling, and the last of all: what LPIPS compares


def make_codes() -> Tensor:
    return torch.randint(VOCAB_SIZE, (BATCH, SCALES.num_tokens), generator=torch.Generator().manual_seed(0))


def make_logits() -> Tensor:
    return torch.randn(BATCH, SCALES.num_tokens, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))


def test_average_over_tokens_is_the_plain_cross_entropy() -> None:
    logits, codes = make_logits(), make_codes()
    scores = token_scores(logits, codes, SCALES)
    plain = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(average_over_tokens(scores.loss, SCALES).mean(), plain)


def test_the_loss_of_a_scale_is_the_mean_over_its_own_tokens() -> None:
    logits, codes = make_logits(), make_codes()
    per_token = -logits.log_softmax(-1).gather(2, codes[:, :, None]).squeeze(2)
    expected = torch.stack([per_token[:, :1].mean(1), per_token[:, 1:5].mean(1), per_token[:, 5:].mean(1)], dim=1)
    torch.testing.assert_close(token_scores(logits, codes, SCALES).loss, expected)


def test_error_counts_the_wrong_tokens_of_each_scale() -> None:
    codes = make_codes()
    guessed = codes.clone()
    guessed[0, 2] = (guessed[0, 2] + 1) % VOCAB_SIZE  # one of the four tokens of scale 2
    guessed[1, 5:] = (guessed[1, 5:] + 1) % VOCAB_SIZE  # all nine of scale 3
    error = token_scores(F.one_hot(guessed, VOCAB_SIZE).float(), codes, SCALES).error
    expected = torch.zeros(BATCH, 3)
    expected[0, 1], expected[1, 2] = 1 / 4, 1
    torch.testing.assert_close(error, expected)


def test_logits_in_bfloat16_are_scored_in_float32() -> None:
    logits, codes = make_logits().bfloat16(), make_codes()
    low, high = token_scores(logits, codes, SCALES), token_scores(logits.float(), codes, SCALES)
    assert low.loss.dtype == torch.float32
    assert torch.equal(low.loss, high.loss)


def test_pixel_loss_is_the_weighted_sum_of_both_norms() -> None:
    images = torch.zeros(2, 3, 4, 4)
    config = ReconstructionLossConfig(l1_weight=0.2, l2_weight=1.0)
    assert pixel_loss(images + 0.5, images, config).item() == pytest.approx(0.2 * 0.5 + 1.0 * 0.25)
    assert pixel_loss(images, images, config).item() == 0


@pytest.mark.parametrize(
    "real, fake, expected",
    [(1.0, -1.0, 0.0), (3.0, -3.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 1.0, 2.0), (1.0, 0.0, 0.5), (0.0, -1.0, 0.5)],
)
def test_hinge_loss_has_its_closed_form(real: float, fake: float, expected: float) -> None:
    patches = torch.ones(2, 1, 3, 3)
    assert hinge_discriminator_loss(real * patches, fake * patches).item() == expected


def weight_of(other: Tensor, adversarial: Tensor, last_layer: Tensor, *, limit: float) -> Tensor:
    return adaptive_weight(last_layer_gradients(other, adversarial, last_layer), limit)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    last_layer = nn.Parameter(torch.ones(2))
    direction = torch.tensor([3.0, 4.0])  # norm 5
    weight = weight_of(6 * last_layer @ direction, 2 * last_layer @ direction, last_layer, limit=1e4)
    assert weight.item() == pytest.approx(3, rel=1e-4)  # the 1e-4 that guards the division, against a norm of 10


def test_adaptive_weight_is_capped() -> None:
    last_layer = nn.Parameter(torch.ones(2))
    loss = last_layer.sum()
    assert weight_of(loss, 0 * loss, last_layer, limit=7.0).item() == 7


def test_adaptive_weight_carries_no_gradient_and_leaves_the_graph_usable() -> None:
    last_layer = nn.Parameter(torch.ones(2))
    loss, adversarial = last_layer.square().sum(), last_layer.sum()
    weight = weight_of(loss, adversarial, last_layer, limit=1e4)
    assert not weight.requires_grad and last_layer.grad is None
    (loss + weight * adversarial).backward()
    torch.testing.assert_close(last_layer.grad, 2 + weight.expand(2))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"l1_weight": -1.0}, "loss.l1_weight is -1.0"),
        ({"lpips_weight": -0.5}, "loss.lpips_weight is -0.5"),
        ({"adversarial_weight": -0.5}, "loss.adversarial_weight is -0.5"),
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "both 0"),
        ({"adversarial_start": 1.5}, "loss.adversarial_start is 1.5"),
    ],
)
def test_impossible_weights_are_refused_by_name(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ReconstructionLossConfig(**changes)


def test_missing_lpips_weights_are_named_with_all_remedies(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_lpips(str(tmp_path / "vgg.pth"))
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path / "vgg.pth"), "vgg16-397923af.pth", "loss.lpips_backbone=", "loss.lpips_weight=0"):
        assert part in message


def test_lpips_weights_are_looked_for_where_torch_keeps_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(FileNotFoundError, match="hub/checkpoints/vgg16-397923af.pth"):
        load_lpips("")
    assert not list(tmp_path.iterdir())  # looking leaves nothing behind


def test_another_file_than_the_published_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    path.write_bytes(b"not the weights")
    digest = hashlib.sha256(b"not the weights").hexdigest()
    with pytest.raises(ValueError, match=f"vgg16-397923af.pth: sha256 is {digest[:12]}"):
        load_lpips(str(path))


def lpips_by_definition(features: nn.Sequential, one: Tensor, other: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1: squared differences of unit features, weighted per channel, averaged over positions."""
    package = Path(importlib.util.find_spec("lpips").origin).parent
    heads = torch.load(package / "weights" / "v0.1" / "vgg.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((images - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for images in (one, other))
    distance = torch.zeros(len(one))
    for number, layer in enumerate(features[: VGG_TAPS[-1] + 1]):
        x, y = layer(x), layer(y)
        if number in VGG_TAPS:
            squared = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)).square()
            distance += (squared * heads[f"lin{VGG_TAPS.index(number)}.model.1.weight"]).sum(1).mean((1, 2))
    return distance


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torchvision")
def test_lpips_puts_every_vgg_layer_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_torchvision()
    from torchvision.models import vgg

    def features_alone() -> nn.Sequential:  # the classifier behind them is nine tenths of VGG16, and LPIPS drops it
        return vgg.make_layers(vgg.cfgs["D"], batch_norm=False)

    monkeypatch.setattr("torchvision.models.vgg16", lambda **options: SimpleNamespace(features=features_alone()))
    trunk = features_alone()
    state = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    path = tmp_path / "vgg16-397923af.pth"
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    published = SimpleNamespace(hexdigest=lambda: VGG16_SHA256)
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: published)
    distance = load_lpips(str(path))
    one, other = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = lpips_by_definition(trunk, one, other)
        got = distance(one, other).flatten()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)  # the package adds 1e-10 before it divides
    assert expected.min() > 0 and distance(one, one).abs().max() == 0
    assert not distance.training and not any(parameter.requires_grad for parameter in distance.parameters())
