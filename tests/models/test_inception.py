"""Inception V3 equals torch-fidelity's network, layer names and resize included, on weights drawn at random."""

from __future__ import annotations

import importlib

import pytest
import torch
from torchvision_import import import_torchvision

from models.inception import InceptionV3, tensorflow_resize


def random_images(*sides: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, *sides), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[InceptionV3, torch.nn.Module]:
    """Ours, and torch-fidelity's with the same weights."""
    import_torchvision()
    torch_fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    ours = InceptionV3()
    for module in ours.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(ours.state_dict(), path)
    layers = ["2048", "logits_unbiased"]
    theirs = torch_fidelity.FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(path))
    return ours, theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sides", [(256, 256), (32, 32), (300, 200)])
def test_features_and_logits_are_torch_fidelitys(networks, sides: tuple[int, int]) -> None:
    ours, theirs = networks
    images = random_images(*sides)
    features, logits, spatial = ours(images)
    expected_features, expected_logits = theirs(images)
    assert torch.allclose(features, expected_features, rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert spatial.shape == (2, 17 * 17 * 7)


@pytest.mark.filterwarnings("ignore")
def test_spatial_features_are_seven_channels_of_the_seventh_mixed_block(networks) -> None:
    ours, theirs = networks
    seen = []
    handle = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = random_images(64, 64)
    theirs(images)
    handle.remove()
    expected = seen[0][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert torch.allclose(ours(images)[2], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sides", [(32, 32), (500, 333), (299, 299)])
def test_the_resize_is_torch_fidelitys(sides: tuple[int, int]) -> None:
    import_torchvision()
    theirs = importlib.import_module("torch_fidelity.interpolate_compat_tensorflow")
    images = random_images(*sides).float()
    expected = theirs.interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    assert torch.allclose(tensorflow_resize(images, 299), expected, atol=1e-4)
