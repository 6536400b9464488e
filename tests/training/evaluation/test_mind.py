"""MIND: zero between equal sets, three times a shift's square, blind to order."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.mind import mind


def features(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 24)).astype(np.float32)


def test_equal_sets_are_at_zero_whatever_their_order() -> None:
    one = features(400)
    assert mind(one, one) == 0
    assert mind(one, one[::-1].copy()) == pytest.approx(0, abs=1e-9)


def test_a_shift_gives_three_times_its_square() -> None:
    shift = np.linspace(-1, 1, 24, dtype=np.float32)
    assert mind(features(400), features(400) + shift, directions=4000) == pytest.approx(3 * (shift @ shift), rel=0.05)


def test_farther_sets_are_farther() -> None:
    real = features(1000)
    near, far = mind(real, features(1000, 1)), mind(real, 1.3 * features(1000, 1))
    assert 0 < near < far


def test_of_a_larger_set_as_many_features_are_drawn_as_the_smaller_has() -> None:
    """Drawing 1,000 of 5,000 features of the same distribution changes the distance by noise alone."""
    some, many = features(1000), features(5000, 1)
    assert mind(some, many) == mind(some, many)
    assert mind(some, many) == pytest.approx(mind(many, some), rel=0.5)
    assert mind(some, many) < 0.1 * mind(some, many + 1)


def test_sets_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, 24\) is needed"):
        mind(features(10), features(10)[:, :20])
