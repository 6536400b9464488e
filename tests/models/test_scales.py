"""Scales: the arithmetic of p_1 .. p_K."""

import pytest
import torch

from models.scales import Scales

SCALES = Scales((2, 3, 5))


def test_a_scale_has_its_side_squared_tokens() -> None:
    assert SCALES.scale_sizes == (4, 9, 25)
    assert (SCALES.num_scales, SCALES.num_tokens, SCALES.first_tokens, SCALES.side) == (3, 38, 4, 5)


def test_slices_cover_the_sequence_without_gap_or_overlap() -> None:
    positions = torch.arange(SCALES.num_tokens)
    assert torch.equal(torch.cat([positions[tokens] for tokens in SCALES.slices]), positions)


@pytest.mark.parametrize("trailing", [(), (7,)])
def test_join_undoes_split(trailing: tuple[int, ...]) -> None:
    codes = torch.randn(2, SCALES.num_tokens, *trailing)
    token_maps = SCALES.split(codes)
    assert [token_map.shape[1] for token_map in token_maps] == [4, 9, 25]
    assert torch.equal(SCALES.join(token_maps), codes)


def test_a_mask_row_allows_exactly_the_scales_up_to_its_own() -> None:
    mask, ids = SCALES.block_causal_mask(), SCALES.scale_ids()
    for row, own in zip(mask, ids.tolist()):
        assert set(ids[row].tolist()) == set(range(own + 1))
        assert row.sum() == sum(SCALES.scale_sizes[: own + 1])


def test_scales_from_a_yaml_list_equal_scales_from_a_tuple() -> None:
    assert Scales([1, 2, 4]) == Scales((1, 2, 4))
    assert hash(Scales([1, 2, 4])) == hash(Scales((1, 2, 4)))


@pytest.mark.parametrize(
    "patch_nums, message",
    [
        ((), "empty"),
        ((0, 1), "positive"),
        ((1, 2.0), "positive"),
        ((True, 2), "positive"),
        ((1, 2, 2), "increasing"),
        ((3, 2), "increasing"),
    ],
)
def test_an_impossible_schedule_is_refused(patch_nums: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scales(patch_nums)


def test_sequences_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="38"):
        SCALES.split(torch.zeros(1, 37))
    with pytest.raises(ValueError, match=r"\(4, 9\)"):
        SCALES.join([torch.zeros(1, 4), torch.zeros(1, 9)])
