"""Eqs. 11 to 16 against each other and against what training costs, laws planted to fit together, and Appendix B."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.study.plan import paper_models
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, Scales
from models.var import VARConfig
from training.accounting import ACCOUNTINGS, BILLION, DENSE_MASK, EXACT, FLOPS_PER_PFLOP, PAPER
from training.laws.paper_laws import (
    PAPER_LAWS,
    Laws,
    eq20,
    eq21,
    generation_costs,
    growth,
    implied_compute,
    notes,
    power,
    relabelled,
)
from training.laws.study_data import METRICS
from training.laws.study_fit import PowerLaw

GROWTH = 0.7  # planted: N ~ C^0.7
EXPONENTS = {"loss_last": -0.23, "loss_avg": -0.2, "error_last": -0.016, "error_avg": -0.01}
PAPER_MODELS = paper_models()
LARGEST = PAPER_MODELS[-1]


def planted(accounting: str = EXACT, *, growths: dict[str, float] | None = None) -> Laws:
    """Laws of runs whose largest ends on the frontier at what its training costs by `accounting`."""
    compute = LARGEST.images * LARGEST.flops_per_image[accounting] / FLOPS_PER_PFLOP
    billions = LARGEST.num_parameters / BILLION
    by_parameters, by_compute = {}, {}
    for name, exponent in EXPONENTS.items():
        law = PowerLaw(exponent=exponent, scale=2.0 * len(name), irreducible=5.0 if name.startswith("loss") else 0.0)
        b = (growths or {}).get(name, GROWTH)
        reducible = float(law.reducible(billions))
        by_parameters[name] = law
        by_compute[name] = replace(law, exponent=b * exponent, scale=reducible ** (1 / (b * exponent)) / compute)
    return Laws(by_parameters, by_compute)


def test_the_printed_laws_are_those_of_the_paper() -> None:
    # eq. 12 at d16 is what a public log of that size measured: 0.9484 (average), here to 2 digits of the law
    billions = VARConfig(depth=16).num_parameters / BILLION
    assert PAPER_LAWS.by_parameters["error_avg"](billions) == pytest.approx(0.9484, rel=1e-3)
    assert [PAPER_LAWS.by_compute[name].exponent for name in METRICS] == [-0.13, -0.16, -0.0067, -0.011]


def test_the_printed_labels_contradict_each_other_beyond_rounding() -> None:
    sizes = implied_compute(PAPER_LAWS, PAPER_MODELS)
    assert max(size.spread for size in sizes) > 1e4
    assert all(size.gap > 5 for size in sizes)
    assert growth(PAPER_LAWS)["error_avg"] > 1


def test_only_with_all_four_labels_swapped_one_compute_suits_all() -> None:
    gaps = {
        kinds: max(size.gap for size in implied_compute(laws, PAPER_MODELS))
        for kinds, laws in relabelled(PAPER_LAWS).items()
    }
    assert gaps.pop(("loss", "error")) == 1
    assert len(gaps) == 3 and all(gap > 2 for gap in gaps.values())


def test_paper_compute_is_a_fifth_of_training_flops() -> None:
    largest = implied_compute(relabelled(PAPER_LAWS)["loss", "error"], PAPER_MODELS)[-1]
    assert largest.spent[EXACT] / largest.middle == pytest.approx(5, abs=1)
    assert largest.spent[PAPER] / largest.middle == pytest.approx(1, abs=0.25)
    assert tuple(largest.spent) == ACCOUNTINGS


@pytest.mark.parametrize("accounting", [EXACT, DENSE_MASK])
def test_nothing_is_said_of_laws_that_fit_together(accounting: str) -> None:
    assert notes(planted(accounting), PAPER_MODELS) == ()


@pytest.mark.parametrize(
    "kinds, places",
    [
        (("loss",), "of the loss in compute are"),
        (("error",), "of the error in compute are"),
        (("loss", "error"), "of the loss in compute and of the two laws of the error in compute are"),
    ],
)
def test_swapped_labels_are_found_in_other_laws_and_nothing_else_is_said(kinds: tuple[str, ...], places: str) -> None:
    found = notes(relabelled(planted())[kinds], PAPER_MODELS)
    assert places in next(note for note in found if "swapped" in note)
    assert not any("FLOPs" in note for note in found)


def test_compute_that_counts_something_else_is_told_from_wrong_labels() -> None:
    (note,) = notes(planted(PAPER), PAPER_MODELS)
    assert "not training FLOPs" in note and "forward pass" in note
    laws = planted()
    far = {name: replace(law, scale=law.scale * 1e4) for name, law in laws.by_compute.items()}
    (note,) = notes(replace(laws, by_compute=far), PAPER_MODELS)
    assert "No accounting known here" in note
    outgrown = notes(planted(growths=dict.fromkeys(METRICS, 1.2)), PAPER_MODELS)
    assert len(outgrown) == 4 and all("outgrow" in note for note in outgrown)
    high = {**laws.by_compute, "loss_last": replace(laws.by_compute["loss_last"], irreducible=7.0)}
    (note,) = notes(replace(laws, by_compute=high), PAPER_MODELS)
    assert "loss_last at d30" in note, "a law in compute that never gets there is named"


def test_bands_hold_every_law_that_would_be_printed_alike() -> None:
    band = implied_compute(PAPER_LAWS, [LARGEST])[0].bands["error_last"]
    printed = PAPER_LAWS.by_compute["error_last"]
    for exponent, scale in np.random.default_rng(0).uniform((-0.00675, 0.0805), (-0.00665, 0.0815), (50, 2)):
        assert (float(f"{exponent:.2g}"), float(f"{scale:.2g}")) == (printed.exponent, printed.scale)
        alike = {**PAPER_LAWS.by_compute, "error_last": power(scale, exponent)}
        compute = implied_compute(replace(PAPER_LAWS, by_compute=alike), [LARGEST])[0].by_metric["error_last"]
        assert band.low <= compute <= band.high


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=6, unique=True).map(sorted))
def test_attention_pairs_are_those_of_a_loop_over_the_steps(patch_nums: list[int]) -> None:
    """Appendix B: without a cache all tokens so far ask for all tokens so far; with one, only the new tokens ask."""
    so_far, uncached, cached = 0, 0, 0
    for side in patch_nums:
        so_far += side * side
        uncached += so_far * so_far
        cached += side * side * so_far
    raster, raster_cached, scales, scales_cached = generation_costs(patch_nums)
    num_raster = patch_nums[-1] ** 2
    assert raster.pairs == sum(i * i for i in range(1, num_raster + 1))  # eq. 17
    assert raster_cached.pairs == sum(range(1, num_raster + 1))
    assert (scales.pairs, scales_cached.pairs) == (uncached, cached)
    assert cached == Scales(tuple(patch_nums)).block_causal_mask().sum().item()
    assert (scales.tokens, scales.steps) == (so_far, len(patch_nums))


@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(3, 2), Fraction(13, 10)])
@pytest.mark.parametrize("num_scales", [1, 2, 10])
def test_eq20_and_eq21_are_the_sum_over_scales(num_scales: int, ratio: Fraction) -> None:
    """The token counts of eq. 18 added up term by term."""
    so_far, pairs = Fraction(0), Fraction(0)
    for k in range(num_scales):
        so_far += ratio ** (2 * k)
        pairs += so_far**2
    assert eq20(num_scales, ratio) == pairs
    assert eq21(float(ratio ** (num_scales - 1)), float(ratio)) == pytest.approx(float(pairs), rel=1e-9)


def test_a_schedule_of_powers_of_two_is_geometric_and_its_cost_grows_as_the_fourth_power_of_the_side() -> None:
    assert eq20(5, 2) == generation_costs((1, 2, 4, 8, 16))[2].pairs
    a, num_scales = 2, 30  # lemma B.2 for a = 2, at a side at which only the leading term is left
    leading = Fraction(a**8 * a ** (4 * (num_scales - 1)), (a**2 - 1) ** 3 * (a**2 + 1))
    assert float(eq20(num_scales, a) / leading) == pytest.approx(1, rel=1e-6)


def test_published_schedules_with_a_cache_have_more_pairs_than_raster_order_and_fewer_steps() -> None:
    for patch_nums, pairs in ((PATCH_NUMS_256, 286_434), (PATCH_NUMS_512, 3_269_850)):
        raster, raster_cached, scales, scales_cached = generation_costs(patch_nums)
        assert scales.pairs < raster.pairs  # what appendix B says
        assert scales_cached.pairs == pairs > 5 * raster_cached.pairs  # what it does not say
        assert scales_cached.tokens > raster_cached.tokens
        assert scales_cached.steps * 25 < raster_cached.steps
