"""Precision, recall, density and coverage: extreme cases, torch-fidelity's numbers, and OpenAI's in float16."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from torchvision_import import import_torchvision

from training.evaluation import manifolds
from training.evaluation.manifolds import Overlap, adm_precision_recall, overlap


def features(count: int, seed: int, *, shift: float = 0.0, width: int = 16, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, size=(count, width)).astype(np.float32)


def test_identical_sets_overlap_fully_and_disjoint_ones_not_at_all() -> None:
    one = features(200, 0)
    same = overlap(one, one)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert overlap(one, one + 1000) == Overlap(0, 0, 0, 0)
    assert adm_precision_recall(one, one) == (1, 1)
    assert adm_precision_recall(one, one + 100) == (0, 0)


def test_duplicates_count_as_inside_their_own_balls() -> None:
    """Balls of duplicates have radius 0, and their own features lie on the edge."""
    many = np.repeat(features(20, 1), 8, axis=0)
    assert overlap(many, many).precision == 1
    assert overlap(many, many).recall == 1


def test_few_modes_have_precision_without_recall() -> None:
    real, modes = features(500, 2), np.repeat(features(5, 2), 100, axis=0)
    found = overlap(real, modes)
    assert found.precision == 1
    assert found.recall < 0.1
    assert found.coverage < 0.2


@pytest.mark.parametrize("block", [64, 10_000])
def test_measures_are_those_of_dense_distance_tables(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "BLOCK", block)
    real, generated = features(300, 3), features(250, 4, shift=0.2)

    def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(((one[:, None].astype(float) - other[None]) ** 2).sum(2))

    def radii(some: np.ndarray, neighbours: int) -> np.ndarray:
        return np.sort(distances(some, some), axis=1)[:, neighbours]

    cross = distances(real, generated)
    dense = cross < radii(real, 5)[:, None]
    expected = Overlap(
        precision=(cross <= radii(real, 3)[:, None]).any(0).mean(),
        recall=(cross <= radii(generated, 3)[None]).any(1).mean(),
        density=dense.sum(0).mean() / 5,
        coverage=dense.any(1).mean(),
    )
    found = overlap(real, generated)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


@pytest.mark.filterwarnings("ignore")
def test_precision_and_recall_are_torch_fidelitys() -> None:
    import_torchvision()
    torch_fidelity = importlib.import_module("torch_fidelity.metric_prc")
    import torch

    real, generated = features(2000, 5, width=2048), features(2000, 6, width=2048, scale=0.99)
    expected = torch_fidelity.prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), verbose=False)
    found = overlap(real, generated)
    assert (found.precision, found.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def adm_oracle(reference: np.ndarray, samples: np.ndarray, block: int) -> tuple[float, float]:
    """OpenAI's evaluator in NumPy: each block of distances in float16 if all of it is finite, else in float32."""

    def pairwise(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        squares = (one * one).sum(1, dtype=np.float32).astype(one.dtype)
        others = (other * other).sum(1, dtype=np.float32).astype(one.dtype)
        product = (one.astype(np.float32) @ other.astype(np.float32).T).astype(one.dtype)
        return np.maximum(squares[:, None] - 2 * product + others[None], 0).astype(np.float32)

    def table(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        rows = []
        for i in range(0, len(one), block):
            parts = []
            for j in range(0, len(other), block):
                some, more = one[i : i + block], other[j : j + block]
                with np.errstate(over="ignore", invalid="ignore"):
                    half = pairwise(some.astype(np.float16), more.astype(np.float16))
                parts.append(half if np.isfinite(half).all() else pairwise(some, more))
            rows.append(np.concatenate(parts, 1))
        return np.concatenate(rows)

    radii = [np.partition(table(some, some), 3, axis=1)[:, 3] for some in (reference, samples)]
    cross = table(reference, samples)
    return float((cross <= radii[0][:, None]).any(0).mean()), float((cross <= radii[1][None]).any(1).mean())


@pytest.mark.parametrize("largest", [1.0, 300.0])  # squares of 300 overflow float16
def test_the_adm_mode_is_openais_in_the_same_types(largest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifolds, "BLOCK", 100)
    reference, samples = features(250, 7, width=64), features(330, 8, width=64, shift=0.1)
    samples[5] *= largest  # one block of the table is taken in float32
    found, expected = adm_precision_recall(reference, samples), adm_oracle(reference, samples, 100)
    assert 0.2 < found[0] < 0.99
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((5, 2)), np.zeros((9, 2)), "5 real and 9 generated features; more than 5"),
        (np.zeros((9, 2)), np.zeros((9, 3)), r"shape \(9, 3\); \(N, 2\) is needed"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), "image 0 are not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(real: np.ndarray, generated: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlap(real, generated)
