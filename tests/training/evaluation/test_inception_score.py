"""The Inception Score: what it must be, torch-fidelity's and OpenAI's numbers, and sets sorted by class."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from torchvision_import import import_torchvision

from training.evaluation.inception_score import adm_inception_score, inception_score, sorting_warning


def one_hot(classes: int, each: int) -> np.ndarray:
    return np.eye(classes)[np.repeat(np.arange(classes), each)]


def softmax(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    logits = np.random.default_rng(0).normal(size=(count, classes), scale=3).astype(np.float32)
    exps = np.exp(logits.astype(np.float64))
    return logits, exps / exps.sum(1, keepdims=True)


def test_balanced_certain_classes_score_their_number_and_a_tenth_of_it_when_sorted() -> None:
    probabilities = one_hot(20, 500)
    shuffled = inception_score(probabilities)
    stored = inception_score(probabilities, seed=None)
    assert shuffled == pytest.approx(20, rel=0.01)
    assert stored == pytest.approx(2, rel=1e-12)
    assert adm_inception_score(probabilities) == pytest.approx(10, rel=1e-6)  # two splits of ten classes
    assert "2.00 as stored" in sorting_warning(stored, shuffled)


def test_an_order_at_random_is_not_called_sorted() -> None:
    probabilities = np.random.default_rng(1).permutation(softmax(2000, 50)[1])
    assert sorting_warning(inception_score(probabilities, seed=None), inception_score(probabilities)) == ""


def test_probabilities_that_say_nothing_score_one() -> None:
    assert inception_score(np.full((100, 8), 1 / 8)) == pytest.approx(1, rel=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_the_score_is_torch_fidelitys() -> None:
    import_torchvision()
    torch_fidelity = importlib.import_module("torch_fidelity.metric_isc")
    import torch

    logits, probabilities = softmax(2003, 100)
    expected = torch_fidelity.isc_features_to_metric(torch.from_numpy(logits))["inception_score_mean"]
    assert inception_score(probabilities) == pytest.approx(expected, rel=1e-6)


def test_the_adm_score_is_that_of_its_formula_in_float32_and_splits_of_5000() -> None:
    probabilities = softmax(12000, 30)[1].astype(np.float32)
    scores = []
    for start in range(0, 12000, 5000):
        part = probabilities[start : start + 5000]
        divergence = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(divergence, 1))))
    assert adm_inception_score(probabilities) == pytest.approx(float(np.mean(scores)), rel=1e-7)


@pytest.mark.parametrize(
    ("probabilities", "splits", "message"),
    [
        (np.ones(4), 1, r"shape \(4,\)"),
        (np.full((4, 2), 0.4), 1, "image 0 sum to 0.8"),
        (np.array([[0.5, 0.5], [1.5, -0.5]]), 1, "image 1"),
        (np.full((4, 2), 0.5), 5, "splits is 5; 1 to 4"),
    ],
)
def test_what_is_no_set_of_probabilities_is_refused(probabilities: np.ndarray, splits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_score(probabilities, splits=splits)
