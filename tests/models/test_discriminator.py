"""The patch discriminator of eq. 5's adversarial term."""

import pytest
import torch

from models.discriminator import PatchDiscriminator


def test_one_logit_per_patch() -> None:
    assert PatchDiscriminator(width=8, num_layers=3)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    assert PatchDiscriminator(width=8, num_layers=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 6, 6)


def test_the_logits_of_an_image_do_not_depend_on_the_rest_of_the_batch() -> None:
    discriminator, images = PatchDiscriminator(width=8, num_layers=2), torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(discriminator(images)[:1], discriminator(images[:1]))


def test_a_logit_sees_its_patch_only() -> None:
    discriminator = PatchDiscriminator(width=8, num_layers=1)
    convolutions = torch.nn.Sequential(*(m for m in discriminator.layers if isinstance(m, torch.nn.Conv2d)))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    convolutions(images)[0, 0, 15, 15].backward()  # norms aside, they see the whole map
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 16  # 4 -> 7 -> 2 * 6 + 4 = 16, the field of n = 1


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, second, other = (PatchDiscriminator(width=8, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_images_too_small_for_a_patch_are_refused() -> None:
    assert PatchDiscriminator(width=8, num_layers=3)(torch.zeros(1, 3, 24, 24)).numel() == 1
    with pytest.raises(ValueError, match="24 or more"):
        PatchDiscriminator(width=8, num_layers=3)(torch.zeros(1, 3, 16, 16))
