"""Masks: from boxes and pictures to tokens of every scale, and back to pixels."""

import pytest
import torch

from models.editing import area_in_tokens, box_in_tokens, keep_tokens, paste_kept_pixels, tokens_to_pixels
from models.scales import Scales

SCALES = Scales((1, 2, 4))
LEFT = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4)


def test_a_mask_keeps_the_same_side_at_every_scale_and_the_coarsest_whole() -> None:
    first, second, third = SCALES.split(keep_tokens(SCALES, LEFT))
    assert first.tolist() == [[True]]
    assert second.tolist() == [[True, False] * 2]
    assert third.tolist() == [[True, True, False, False] * 4]


def test_the_coarsest_scale_may_be_left_to_chance() -> None:
    assert not keep_tokens(SCALES, LEFT, keep_coarsest=False)[0, 0]  # half is kept, which does not exceed 0.5
    most = torch.ones(4, 4)
    most[0, 0] = 0
    assert keep_tokens(SCALES, most, keep_coarsest=False)[0, 0]
    assert not keep_tokens(SCALES, torch.zeros(4, 4))[0, 1:].any()


def test_masks_come_alone_or_in_a_batch_as_booleans_or_numbers() -> None:
    assert keep_tokens(SCALES, LEFT).shape == (1, 21)
    batch = torch.stack([LEFT, 1 - LEFT])
    assert torch.equal(keep_tokens(SCALES, batch)[:1], keep_tokens(SCALES, LEFT.bool()))
    assert torch.equal(keep_tokens(SCALES, batch)[1:], keep_tokens(SCALES, 1 - LEFT))


@pytest.mark.parametrize("shape", [(2, 2), (4,), (1, 1, 4, 4), (16, 16)])
def test_a_mask_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"keep_mask has shape .* expected \(4, 4\)"):
        keep_tokens(SCALES, torch.ones(shape))


def test_a_box_is_rounded_to_whole_tokens() -> None:
    assert box_in_tokens((0.0, 0.0, 1.0, 0.5), 4).float().equal(LEFT)
    assert box_in_tokens((0.1, 0.1, 0.9, 0.6), 4).float().equal(LEFT)
    assert box_in_tokens((0.0, 0.0, 1.0, 1.0), 4).all()


@pytest.mark.parametrize(
    "box, message",
    [
        ((0.5, 0.0, 0.5, 1.0), "0 <= y0 < y1 <= 1"),
        ((0.0, 0.0, 1.0, 1.5), "0 <= x0 < x1 <= 1"),
        ((0.0, 0.0, 0.1, 1.0), "thinner than half a token"),
    ],
)
def test_a_box_without_tokens_is_refused(box: tuple[float, float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        box_in_tokens(box, 4)


def test_an_area_takes_the_tokens_of_which_it_covers_more_than_half() -> None:
    area = torch.zeros(8, 8, dtype=torch.bool)
    area[:, :3] = True  # half of the second column of tokens
    assert area_in_tokens(area, 4).tolist() == [[True, False, False, False]] * 4
    area[0, 3] = True
    assert area_in_tokens(area, 4)[0].tolist() == [True, True, False, False]


def test_kept_tokens_are_squares_of_pixels() -> None:
    pixels = tokens_to_pixels(LEFT.bool(), 8)
    assert pixels.shape == (8, 8) and pixels[:, :4].all() and not pixels[:, 4:].any()


def test_kept_pixels_are_the_originals_and_the_seam_fades_outside_them() -> None:
    original, edited = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept[:, :3] = True
    row = paste_kept_pixels(original, edited, kept, feather=3)[0, 0, 4]
    torch.testing.assert_close(row, torch.tensor([1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]))


def test_without_feather_the_seam_is_hard_and_both_sides_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    original, edited = torch.rand(2, 2, 3, 8, 8, generator=generator)
    kept = torch.rand(8, 8, generator=generator) > 0.5
    assert torch.equal(paste_kept_pixels(original, edited, kept, feather=0), torch.where(kept, original, edited))
    with pytest.raises(ValueError, match="feather -1"):
        paste_kept_pixels(original, edited, kept, feather=-1)
