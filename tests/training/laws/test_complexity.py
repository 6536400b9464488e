"""Appendix B: its closed forms against loops over steps, and for the published schedules."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, Scales
from training.laws.complexity import (
    ar_pairs,
    ar_pairs_cached,
    eq21,
    generation_costs,
    geometric_var_pairs,
    var_pairs,
    var_pairs_cached,
)

SCHEDULES = st.lists(st.integers(1, 24), min_size=1, max_size=6, unique=True).map(lambda sides: Scales(sorted(sides)))


@pytest.mark.parametrize("side", [1, 2, 3, 7, 16])
def test_eq17_is_the_loop_over_tokens(side: int) -> None:
    assert ar_pairs(side) == sum(i * i for i in range(1, side**2 + 1))
    assert ar_pairs_cached(side) == sum(range(1, side**2 + 1))


@settings(max_examples=30, deadline=None)
@given(SCHEDULES)
def test_next_scale_pairs_are_the_loop_over_scales(scales: Scales) -> None:
    so_far, uncached, cached = 0, 0, 0
    for side in scales.patch_nums:
        so_far += side * side
        uncached += so_far * so_far  # all tokens so far ask for all tokens so far
        cached += side * side * so_far  # only this scale's tokens ask
    assert (var_pairs(scales), var_pairs_cached(scales)) == (uncached, cached)
    assert cached == scales.block_causal_mask().sum().item()


def eq20(num_scales: int, ratio: Fraction) -> Fraction:
    """Eq. 20 term by term, with the token counts of eq. 18 added up."""
    so_far, pairs = Fraction(0), Fraction(0)
    for k in range(num_scales):
        so_far += ratio ** (2 * k)
        pairs += so_far**2
    return pairs


@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(3), Fraction(3, 2), Fraction(13, 10)])
@pytest.mark.parametrize("num_scales", [1, 2, 5, 10])
def test_eq21_and_the_shorter_form_are_the_sum(num_scales: int, ratio: Fraction) -> None:
    side = ratio ** (num_scales - 1)
    assert geometric_var_pairs(num_scales, ratio) == eq20(num_scales, ratio)
    assert eq21(float(side), float(ratio)) == pytest.approx(float(eq20(num_scales, ratio)), rel=1e-9)


def test_a_schedule_of_powers_of_two_is_geometric() -> None:
    assert geometric_var_pairs(5, 2) == var_pairs(Scales((1, 2, 4, 8, 16)))


def test_cost_grows_as_the_fourth_power_of_the_side() -> None:
    a, num_scales = 2, 30  # lemma B.2 for a = 2, at a side at which only the leading term is left
    leading = Fraction(a**8 * a ** (4 * (num_scales - 1)), (a**2 - 1) ** 3 * (a**2 + 1))
    assert float(geometric_var_pairs(num_scales, a) / leading) == pytest.approx(1, rel=1e-6)


def test_published_schedules_with_a_cache_have_more_pairs_than_raster_order_and_fewer_steps() -> None:
    for patch_nums in (PATCH_NUMS_256, PATCH_NUMS_512):
        raster, raster_cached, scales, scales_cached = generation_costs(Scales(patch_nums))
        assert scales.pairs < raster.pairs  # what appendix B says
        assert scales_cached.pairs > 5 * raster_cached.pairs  # what it does not say
        assert scales_cached.tokens > raster_cached.tokens
        assert scales_cached.steps * 25 < raster_cached.steps
    assert scales_cached.pairs == 3_269_850
    assert generation_costs(Scales(PATCH_NUMS_256))[3].pairs == 286_434


@pytest.mark.parametrize("ratio", [1, 0.5])
def test_a_ratio_that_does_not_grow_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="must be above 1"):
        eq21(16, ratio)
    with pytest.raises(ValueError, match="must be above 1"):
        geometric_var_pairs(5, Fraction(ratio))


def test_a_schedule_has_a_scale() -> None:
    with pytest.raises(ValueError, match="num_scales 0"):
        geometric_var_pairs(0, 2)
