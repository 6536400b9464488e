"""Levenberg and Marquardt's method, against closed forms and another optimiser."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from training.laws.robust_fit import Problem, costs_of, huber_delta, minimise, redraw

X = np.linspace(-1, 2, 9)
NOISE = np.asarray([0.3, -0.2, 0.1, 0.4, -0.5, 0.2, -0.1, 0.0, -0.2])
FREE = np.asarray([np.inf, np.inf])


def line(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    jacobian = np.tile(np.stack([np.ones_like(X), X], axis=-1), (len(parameters), 1, 1))
    return parameters[:, :1] + parameters[:, 1:] * X, jacobian


def growth(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    power = np.exp(np.clip(parameters[:, 1:] * X, -50, 50))
    return parameters[:, :1] * power, np.stack([power, parameters[:, :1] * X * power], axis=-1)


def test_least_squares_of_a_line_are_the_closed_form() -> None:
    target = 2 - 3 * X + NOISE
    found = minimise(Problem(line, target, -FREE, FREE), np.zeros((1, 2))).best()
    assert found == pytest.approx(np.polyfit(X, target, 1)[::-1], abs=1e-10)


def test_a_weight_counts_a_point_as_often_as_it_says() -> None:
    target, weights = 2 - 3 * X + NOISE, np.arange(9.0)
    problem = Problem(line, target, -FREE, FREE)
    found = redraw(problem, np.zeros(2), np.stack([weights, np.ones(9)]))
    repeats = np.repeat(np.arange(9), weights.astype(int))
    assert found[0] == pytest.approx(np.polyfit(X[repeats], target[repeats], 1)[::-1], abs=1e-6)
    assert found[1] == pytest.approx(np.polyfit(X, target, 1)[::-1], abs=1e-6)


def test_hubers_minimum_is_the_one_another_optimiser_finds() -> None:
    target = 2 * np.exp(-0.7 * X) + 0.1 * NOISE
    target[3] += 5
    problem = Problem(growth, target, -FREE, FREE, delta=0.03)
    found = minimise(problem, np.asarray([[1.0, 0.0], [5.0, -2.0]])).best()
    other = minimize(
        lambda p: float(costs_of(problem, p[None])[0]),
        [1.5, -0.5],
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000},
    )
    assert found == pytest.approx(other.x, abs=1e-6)


def test_one_wild_point_hardly_moves_hubers_line() -> None:
    target = 2 - 3 * X
    target[4] = 100
    robust = minimise(Problem(line, target, -FREE, FREE, delta=1e-3), np.zeros((1, 2))).best()
    squares = minimise(Problem(line, target, -FREE, FREE), np.zeros((1, 2))).best()
    assert robust == pytest.approx([2, -3], abs=1e-3)
    assert abs(squares[0] - 2) > 1


def test_a_parameter_stops_at_its_bound_and_the_others_go_on() -> None:
    problem = Problem(line, 2 - 3 * X, -FREE, np.asarray([1.0, np.inf]))
    found = minimise(problem, np.zeros((1, 2))).best()
    assert found[0] == 1
    assert found[1] == pytest.approx(float((X * (2 - 3 * X - 1)).sum() / (X**2).sum()))


def test_the_threshold_is_that_of_the_noise_and_never_zero() -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(4000)
    assert huber_delta(noise, 2) == pytest.approx(1.345 * 0.02, rel=0.05)
    assert huber_delta(np.zeros(12), 3) > 0
