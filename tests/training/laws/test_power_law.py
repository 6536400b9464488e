"""Planted power laws: found without noise, inside their intervals with it, and not told where nothing tells them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from planted import BILLIONS, points_of
from scipy.stats import linregress, t

from training.laws.power_law import (
    Points,
    bootstrap,
    fit_power_law,
    pearson,
    percentiles,
    r_squared,
    resample,
    runs_test,
    student_interval,
)

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


def test_the_unit_of_x_changes_the_scale_only() -> None:
    billions, units = points_of(TRUTH), points_of(TRUTH, BILLIONS * 1e9)
    one, other = fit_power_law(billions, None), fit_power_law(units, None)
    assert other.exponent == pytest.approx(one.exponent, rel=1e-9)
    assert other.scale * 1e9 == pytest.approx(one.scale, rel=1e-6)


@pytest.mark.parametrize("irreducible", [5.0, None])
def test_an_interval_of_95_per_cent_holds_the_truth_about_so_often(irreducible: float | None) -> None:
    """With E given by the bootstrap, with E fitted by Student's t: the quick half; the slow test has both of both."""
    check_coverage(irreducible, draws=100, by_bootstrap=irreducible is not None, by_student=irreducible is None)


@pytest.mark.slow
@pytest.mark.parametrize("irreducible", [5.0, None])
def test_intervals_of_1000_draws_hold_the_truth_about_so_often(irreducible: float | None) -> None:
    check_coverage(irreducible, draws=1000, by_bootstrap=True, by_student=True)


def check_coverage(irreducible: float | None, *, draws: int, by_bootstrap: bool, by_student: bool) -> None:
    """Twelve sizes, noise of 0.1 %, 300 studies: 90 to 98 % of the intervals hold the exponent."""
    rng = np.random.default_rng(11)
    bootstrapped, student = [], []
    for _ in range(300):
        points = points_of(TRUTH * np.exp(1e-3 * rng.standard_normal(12)))
        if by_bootstrap:
            bootstrapped.append(percentiles(bootstrap(points, irreducible, draws=draws, rng=rng).exponent_draws))
        if by_student:
            student.append(student_interval(points, irreducible))
    for intervals in filter(None, (bootstrapped, student)):
        held = [interval.low <= -0.2 <= interval.high for interval in intervals]
        assert 0.90 <= np.mean(held) <= 0.98


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
    fit = bootstrap(points_of(y), None, draws=100, rng=np.random.default_rng(0))
    assert fit.law.irreducible == 0
    assert (fit.irreducible_draws >= 0).all()
    assert student_interval(points_of(y), None) == student_interval(points_of(y), 0.0)


def test_draws_of_a_law_lie_around_it_and_predict() -> None:
    points = points_of(TRUTH * np.exp(1e-3 * np.random.default_rng(3).standard_normal(12)))
    fit = bootstrap(points, None, draws=200, rng=np.random.default_rng(0))
    spread = percentiles(fit.predictions(1.0))
    assert spread.low < fit.law(1.0) < spread.high
    assert spread.high - spread.low < 0.03
    again = bootstrap(points, None, draws=200, rng=np.random.default_rng(0))
    assert (again.exponent_draws == fit.exponent_draws).all()


def test_points_of_one_group_are_drawn_together() -> None:
    weights = resample(("a", "b", "b", "c"), draws=50, distinct=2, rng=np.random.default_rng(0))
    assert (weights[:, 1] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert ((weights[:, [0, 1, 3]] > 0).sum(axis=1) >= 2).all()


def test_the_middle_of_a_group_is_its_middle_in_the_logs() -> None:
    middles = Points(("a", "a", "b"), np.asarray([1.0, 100.0, 7.0]), np.asarray([4.0, 9.0, 5.0])).one_each()
    assert middles.groups == ("a", "b")
    assert middles.x == pytest.approx([10, 7])
    assert middles.y == pytest.approx([6, 5])


@pytest.mark.parametrize("num_signs", [2, 5, 8])
def test_the_runs_test_counts_all_orders_of_the_signs(num_signs: int) -> None:
    def runs(signs: tuple[int, ...]) -> int:
        return 1 + sum(left != right for left, right in itertools.pairwise(signs))

    for signs in itertools.product((-1, 1), repeat=num_signs):
        orders = [runs(other) for other in itertools.product((-1, 1), repeat=num_signs) if sum(other) == sum(signs)]
        few = np.mean([count <= runs(signs) for count in orders])
        many = np.mean([count >= runs(signs) for count in orders])
        expected = min(1.0, 2 * min(few, many)) if abs(sum(signs)) < num_signs else 1.0
        assert runs_test(np.asarray(signs, dtype=float)) == pytest.approx(expected)


def test_residuals_that_bend_come_in_runs() -> None:
    wrong = fit_power_law(points_of(TRUTH), 0.0)
    assert runs_test(np.log(TRUTH) - np.log(wrong(BILLIONS))) < 0.05


def test_pearson_stays_above_099_where_the_exponent_is_wrong_by_half() -> None:
    """E = 4 in place of 5 nats: r says nothing, the exponent is 47 % off."""
    points = points_of(TRUTH)
    assert pearson(points, 5.0) == pytest.approx(-1)
    assert abs(pearson(points, 4.0)) > 0.99
    assert fit_power_law(points, 4.0).exponent == pytest.approx(-0.107, abs=0.003)


def test_r_squared_is_1_for_the_law_and_0_for_the_mean() -> None:
    y = np.asarray([2.0, 3.0, 5.0])
    assert r_squared(np.zeros(3), y) == 1
    assert r_squared(np.log(y) - np.log(y).mean(), y) == pytest.approx(0)


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
