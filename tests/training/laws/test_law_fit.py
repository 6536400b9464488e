"""The gate is prediction: it tells a wrong irreducible part, which Pearson's r does not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from planted import BILLIONS, NAMES, points_of, quick

from training.laws.law_fit import Irreducible, fit_law, hold_out, split
from training.laws.study_fit import PARAMETERS, LawFit

CONFIG = quick()
TRUTH = 5 + (2.5 * BILLIONS) ** -0.2


def fit(y: np.ndarray, irreducible: float | None) -> LawFit:
    constant, rng = Irreducible(irreducible, "a test"), np.random.default_rng(0)
    return fit_law(points_of(y), "loss_avg", PARAMETERS, constant, config=CONFIG, left_out=(), rng=rng)


@pytest.mark.parametrize(("noise", "irreducible"), [(0.0, None), (5e-4, None), (5e-4, 5.0)])
def test_the_right_law_predicts_the_two_largest_sizes(noise: float, irreducible: float | None) -> None:
    found = fit(TRUTH * np.exp(noise * np.random.default_rng(4).standard_normal(12)), irreducible)
    assert [point.name for point in found.held_out] == ["d26", "d30"]
    for point in found.held_out:
        assert point.passed
        assert point.share == pytest.approx(
            abs(point.predicted - point.measured) / (point.measured - found.law.irreducible)
        )


@pytest.mark.parametrize("irreducible", [0.0, 4.5, 5.2])
def test_a_wrong_irreducible_part_fails_the_gate_while_r_stays_above_099(irreducible: float) -> None:
    found = fit(TRUTH, irreducible)
    assert abs(found.pearson) > 0.99
    assert not all(point.passed for point in found.held_out)


@pytest.mark.parametrize(("irreducible", "least", "most"), [(4.5, 0.65, 1.0), (5.0, 0.0, 0.15), (5.2, 0.65, 1.0)])
def test_noise_hides_a_wrong_irreducible_part_from_the_gate_seldom(
    irreducible: float, least: float, most: float
) -> None:
    """The share of 20 studies with noise of 0.1 % that fail."""
    failures = 0
    for seed in range(20):
        points = points_of(TRUTH * np.exp(1e-3 * np.random.default_rng(seed).standard_normal(12)))
        found = hold_out(points, irreducible, irreducible, config=CONFIG, rng=np.random.default_rng(0))
        failures += not all(point.passed for point in found)
    assert least <= failures / 20 <= most


def test_the_prediction_is_of_a_law_that_has_not_seen_the_held_out_sizes() -> None:
    spoilt = TRUTH.copy()
    spoilt[-2:] += 0.2
    honest, fooled = fit(TRUTH, 5.0).held_out, fit(spoilt, 5.0).held_out
    assert [point.predicted for point in fooled] == pytest.approx([point.predicted for point in honest])
    assert not any(point.passed for point in fooled)


def test_an_error_rate_that_stops_falling_fails_though_it_is_2_per_mille_off() -> None:
    """alpha is 0.01: the two largest sizes gain 0.6 % of the rate, so that a share of the rate is no measure."""
    rate = (400 * BILLIONS) ** -0.01
    assert all(point.passed for point in fit(rate, 0.0).held_out)
    rate[-2:] = rate[-3]
    worst = fit(rate, 0.0).held_out[-1]
    assert worst.share < CONFIG.gate
    assert not worst.passed


@pytest.mark.parametrize("num_sizes, irreducible, expected", [(12, None, 2), (5, None, 1), (4, None, 0), (4, 5.0, 1)])
def test_so_many_sizes_are_held_out_as_leave_enough_to_fit(
    num_sizes: int, irreducible: float | None, expected: int
) -> None:
    points = points_of(TRUTH[:num_sizes], BILLIONS[:num_sizes])
    kept, held = split(points, 2, irreducible)
    assert held.groups == NAMES[num_sizes - expected : num_sizes]
    assert len(kept.x) == num_sizes - expected
    assert len(hold_out(points, irreducible, 5.0, config=CONFIG, rng=np.random.default_rng(0))) == expected


def test_the_sensitivity_table_shows_how_the_exponent_moves() -> None:
    rows = fit(TRUTH, None).sensitivity
    assert rows[0].irreducible == 0
    assert all(left.irreducible < right.irreducible for left, right in pairwise(rows))
    assert all(left.exponent > right.exponent for left, right in pairwise(rows))
    best = min(rows, key=lambda row: abs(row.held_out_nats))
    assert best.irreducible == pytest.approx(5.0, abs=1e-6)


def test_a_fit_says_what_it_was_made_of() -> None:
    found = fit(TRUTH * np.exp(1e-3 * np.random.default_rng(5).standard_normal(12)), None)
    assert found.names == NAMES
    assert found.residuals == pytest.approx(np.log(found.y) - np.log(found.law(np.asarray(found.x))))
    assert abs(np.mean(found.residuals)) < 1e-3
    assert found.exponent_interval.low < found.law.exponent < found.exponent_interval.high
    assert found.irreducible_interval.low < found.law.irreducible < found.irreducible_interval.high
    assert np.shape(found.draws) == (CONFIG.draws, 3)
    assert fit(TRUTH, 5.0).irreducible_interval is None
