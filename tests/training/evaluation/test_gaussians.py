"""The Frechet distance: closed forms, torch-fidelity's numbers, and sums that do not depend on the ranks."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from torchvision_import import import_torchvision

from training.evaluation.gaussians import (
    Gaussian,
    Moments,
    adm_gaussian,
    frechet_distance,
    gaussian_of,
    relative_frechet,
)

RANDOM = np.random.default_rng(0)


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Features like an extractor's: positive, correlated, of unequal scales."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    raw = random.normal(size=(count, width)) @ mixing * np.linspace(0.1, 2, width) + shift
    return np.maximum(raw, 0).astype(np.float32)


def test_gaussians_with_diagonal_covariances_have_the_closed_form() -> None:
    one = Gaussian(np.array([1.0, 2.0, 3.0]), np.diag([4.0, 9.0, 0.0]), 100)
    other = Gaussian(np.array([0.0, 2.0, 5.0]), np.diag([1.0, 1.0, 4.0]), 100)
    expected = 1 + 0 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2 + (0 - 2) ** 2
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)


def test_a_rotation_of_both_gaussians_changes_nothing() -> None:
    one, other = gaussian_of(features(300, 12, 1)), gaussian_of(features(300, 12, 2, shift=0.3))
    turn, _ = np.linalg.qr(RANDOM.normal(size=(12, 12)))

    def turned(gaussian: Gaussian) -> Gaussian:
        return Gaussian(turn @ gaussian.mean, turn @ gaussian.covariance @ turn.T, gaussian.count)

    assert frechet_distance(turned(one), turned(other)) == pytest.approx(frechet_distance(one, other), rel=1e-9)


@pytest.mark.parametrize("count", [10, 500])  # fewer than the width: a singular covariance
def test_a_set_is_at_zero_from_itself_and_as_far_one_way_as_the_other(count: int) -> None:
    one, other = gaussian_of(features(count, 40, 1)), gaussian_of(features(count, 40, 2, shift=0.2))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), rel=1e-9)
    assert one.is_singular == (count <= 40)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_distance_is_torch_fidelitys(width: int) -> None:
    import_torchvision()
    torch_fidelity = importlib.import_module("torch_fidelity.metric_fid")
    import torch

    one, other = features(2000, width, 1), features(2000, width, 2, shift=0.1)
    statistics = [torch_fidelity.fid_features_to_statistics(torch.from_numpy(some)) for some in (one, other)]
    expected = torch_fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(adm_gaussian(one), adm_gaussian(other)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(gaussian_of(one), gaussian_of(other)) == pytest.approx(expected, rel=1e-5)


def test_streamed_sums_give_the_gaussian_of_the_whole_set() -> None:
    whole = features(1000, 20, 3)
    moments = Moments(20)
    for part in np.array_split(whole, 7):
        moments.add(part)
    streamed = moments.gaussian()
    assert np.allclose(streamed.mean, whole.mean(0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(streamed.covariance, np.cov(whole.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_sum_whole_parts_agree_with_one_process_to_the_last_bit(ranks: int) -> None:
    parts = np.array_split(features(1000, 20, 4), 10)

    def summed(part: np.ndarray) -> Moments:
        moments = Moments(20)
        moments.add(part)
        return moments

    shares = [{i: summed(part) for i, part in enumerate(parts) if i % ranks == rank} for rank in range(ranks)]
    alone, together = Moments(20), Moments(20)
    for index, part in enumerate(parts):
        alone.merge(summed(part))
        together.merge(shares[index % ranks][index])
    assert np.array_equal(alone.gaussian().covariance, together.gaussian().covariance)
    assert np.array_equal(alone.gaussian().mean, together.gaussian().mean)


def test_the_relative_distance_of_validation_is_one() -> None:
    validation = {"lite0": 0.5, "inception": 2.0}
    assert relative_frechet(validation, validation) == 1
    assert relative_frechet({"lite0": 1.0, "inception": 2.0}, validation) == 1.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_of(np.zeros((1, 4))), "two features or more, not 1"),
        (lambda: gaussian_of(np.zeros((2, 2, 2))[:, :, 0][0:2] * np.nan), "image 0 are not finite"),
        (lambda: Moments(3).add(np.zeros((5, 4))), r"shape \(5, 4\); \(N, 3\) is needed"),
        (lambda: frechet_distance(gaussian_of(np.eye(3)), gaussian_of(np.eye(4))), "widths 3 and 4"),
        (lambda: relative_frechet({"a": 1.0}, {"b": 1.0}), "same feature spaces"),
        (lambda: relative_frechet({"a": 1.0}, {"a": 0.0}), r"FD\(validation\) in a is not positive"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
