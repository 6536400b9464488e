"""Planted power laws: found without noise, inside their intervals with it, and not told where nothing tells them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from planted import BILLIONS, points_of
from scipy.stats import linregress, t

from training.laws.power_law import (
    Points,
    bootstrap,
    fit_power_law,
    percentiles,
    resample,
    runs_test,
    student_interval,
)
from training.laws.study_fit import Interval

TRUTH = 5 + (2.5 * BILLIONS) ** -0.2


@pytest.mark.parametrize("irreducible", [None, 5.0])
def test_a_law_without_noise_is_found(irreducible: float | None) -> None:
    law = fit_power_law(points_of(TRUTH), irreducible)
    assert (law.exponent, law.scale, law.irreducible) == pytest.approx((-0.2, 2.5, 5.0), rel=1e-6)


@pytest.mark.parametrize("scale, exponent", [(2.0, -0.23), (49.0, -0.016), (1e-12, -0.0067), (30.0, -1.5)])
def test_laws_of_any_scale_are_found(scale: float, exponent: float) -> None:
    """Eqs. 11 to 16 have exponents of 0.0067 to 0.23, and scales that differ by powers of ten."""
    y = (scale * BILLIONS) ** exponent
    law = fit_power_law(points_of(y), 0.0)
    assert law.exponent == pytest.approx(exponent, rel=1e-6)
    assert law(BILLIONS) == pytest.approx(y, rel=1e-9)


@pytest.mark.parametrize("irreducible", [5.0, pytest.param(None, marks=pytest.mark.slow)])
def test_students_interval_of_95_per_cent_holds_the_truth_about_so_often(irreducible: float | None) -> None:
    check_coverage(lambda points, rng: student_interval(points, irreducible), num_studies=200, low=0.90, high=0.98)


@pytest.mark.slow
@pytest.mark.parametrize("irreducible", [5.0, None])
def test_a_bootstrapped_interval_of_95_per_cent_holds_the_truth_about_so_often(irreducible: float | None) -> None:
    def interval(points: Points, rng: np.random.Generator) -> Interval:
        return percentiles(bootstrap(points, irreducible, draws=200, rng=rng).exponent_draws)

    check_coverage(interval, num_studies=300, low=0.90, high=0.985)


def check_coverage(
    interval: Callable[[Points, np.random.Generator], Interval], *, num_studies: int, low: float, high: float
) -> None:
    """Plant twelve sizes with noise of 0.1 % so many times, and bound the share of intervals that hold the exponent."""
    rng, held = np.random.default_rng(11), []
    for _ in range(num_studies):
        found = interval(points_of(TRUTH * np.exp(1e-3 * rng.standard_normal(12))), rng)
        held.append(found.low <= -0.2 <= found.high)
    assert low <= np.mean(held) <= high


def test_students_interval_of_a_straight_line_is_that_of_linear_regression() -> None:
    y = (2 * BILLIONS) ** -0.02 * np.exp(1e-3 * np.random.default_rng(1).standard_normal(12))
    line = linregress(np.log(BILLIONS), np.log(y))
    half = t.ppf(0.975, 10) * line.stderr
    found = student_interval(points_of(y), 0.0)
    assert (found.low, found.high) == pytest.approx((line.slope - half, line.slope + half), abs=1e-9)


def test_one_wrong_size_does_not_make_the_law() -> None:
    y = TRUTH * np.exp(1e-4 * np.random.default_rng(2).standard_normal(12))
    y[4] *= 1.02
    assert fit_power_law(points_of(y), 5.0).exponent == pytest.approx(-0.2, abs=0.005)


def test_points_on_a_straight_line_have_no_irreducible_part() -> None:
    """Bent the other way, as if E were negative: a loss cannot be, and E is not fitted below 0."""
    y = 3 * BILLIONS**-0.1 - 0.5
    fit = bootstrap(points_of(y), None, draws=20, rng=np.random.default_rng(0))
    assert fit.law.irreducible == 0
    assert (fit.irreducible_draws >= 0).all()
    assert student_interval(points_of(y), None) == student_interval(points_of(y), 0.0)


def test_points_of_one_group_are_drawn_together() -> None:
    weights = resample(("a", "b", "b", "c"), draws=50, distinct=2, rng=np.random.default_rng(0))
    assert (weights[:, 1] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert ((weights[:, [0, 1, 3]] > 0).sum(axis=1) >= 2).all()


@pytest.mark.parametrize("num_signs", [2, 6])
def test_the_runs_test_counts_all_orders_of_the_signs(num_signs: int) -> None:
    def runs(signs: tuple[int, ...]) -> int:
        return 1 + sum(left != right for left, right in itertools.pairwise(signs))

    for signs in itertools.product((-1, 1), repeat=num_signs):
        orders = [runs(other) for other in itertools.product((-1, 1), repeat=num_signs) if sum(other) == sum(signs)]
        few = np.mean([count <= runs(signs) for count in orders])
        many = np.mean([count >= runs(signs) for count in orders])
        expected = min(1.0, 2 * min(few, many)) if abs(sum(signs)) < num_signs else 1.0
        assert runs_test(np.asarray(signs, dtype=float)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "points, irreducible, message",
    [
        (points_of(TRUTH[:3], BILLIONS[:3]), None, "3 sizes are too few for 3 numbers; 4 or more"),
        (points_of(TRUTH[:2], BILLIONS[:2]), 0.0, "2 sizes are too few"),
        (points_of(np.full(12, 6.0)), 0.0, "does not change"),
        (points_of(TRUTH), 5.9, "5.9 is not below the lowest value, 5.72"),
        (points_of(TRUTH[::-1]), None, "does not fall"),
    ],
)
def test_what_tells_no_law_is_refused(points: Points, irreducible: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power_law(points, irreducible)
