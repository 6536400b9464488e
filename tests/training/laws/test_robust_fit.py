"""Huber's regression by scipy: bootstrap counts repeat points, bounds hold, and the threshold follows the noise."""

from __future__ import annotations

import numpy as np
import pytest

from training.laws.robust_fit import Problem, huber_delta, minimise, redraw

X = np.linspace(-1, 2, 9)
NOISE = np.asarray([0.3, -0.2, 0.1, 0.4, -0.5, 0.2, -0.1, 0.0, -0.2])
FREE = np.asarray([np.inf, np.inf])


def line(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return parameters[0] + parameters[1] * X, np.stack([np.ones_like(X), X], axis=-1)


def test_a_count_repeats_a_point_as_often_as_it_says() -> None:
    target, counts = 2 - 3 * X + NOISE, np.arange(9)
    found = redraw(Problem(line, target, -FREE, FREE), np.zeros(2), np.stack([counts, np.ones(9, dtype=int)]))
    repeats = np.repeat(np.arange(9), counts)
    assert found[0] == pytest.approx(np.polyfit(X[repeats], target[repeats], 1)[::-1], abs=1e-6)
    assert found[1] == pytest.approx(np.polyfit(X, target, 1)[::-1], abs=1e-6)


def test_a_draw_moves_however_little_noise_there_is() -> None:
    """An absolute tolerance of the gradient would take the start of every draw for its minimum."""
    target = 2 - 3 * X + 1e-9 * NOISE
    problem = Problem(line, target, -FREE, FREE)
    found = redraw(problem, minimise(problem, np.zeros((1, 2))), np.arange(9)[None])[0]
    repeats = np.repeat(np.arange(9), np.arange(9))
    assert (found - [2, -3]) * 1e9 == pytest.approx(np.polyfit(X[repeats], NOISE[repeats], 1)[::-1], rel=1e-2, abs=1e-3)


def test_the_threshold_is_that_of_the_noise_and_never_zero() -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(4000)
    assert huber_delta(noise, 2) == pytest.approx(1.345 * 0.02, rel=0.05)
    assert huber_delta(np.zeros(12), 3) > 0
