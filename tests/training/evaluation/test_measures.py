"""All measures together: nearer sets are nearer by every one, in both modes, and a reference keeps its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.evaluation import reference as reference_module
from training.evaluation.extractors import Extractor, Features
from training.evaluation.measures import cautions, measure
from training.evaluation.reference import Reference, ReferenceSums

WIDTH = 12
DESCRIPTION = {"extractor": "mine", "extractor_sha256": "a" * 64, "side": 16}


def features(count: int, seed: int, scale: float = 1.0) -> Features:
    random = np.random.default_rng(seed)
    table = (scale * random.normal(size=(count, WIDTH))).astype(np.float32)
    odds = np.exp(4 * random.normal(size=(count, 10)))
    probabilities = (odds / odds.sum(1, keepdims=True)).astype(np.float32)
    return Features(table, probabilities, table[:, :5].copy())


def reference_of(parts: list[Features]) -> Reference:
    sums = ReferenceSums(sum(len(part.features) for part in parts))
    for part in parts:
        sums.add(part)
    return sums.reference(DESCRIPTION)


@pytest.mark.parametrize("mode", ["float64", "adm"])
def test_a_nearer_set_is_nearer_by_every_measure(mode: str) -> None:
    reference = reference_of([features(800, 0)])
    near = measure(features(400, 1), reference, mode=mode)
    far = measure(features(400, 1, scale=3), reference, mode=mode)
    assert near["fd"] < far["fd"] and near["sfd"] < far["sfd"] and near["precision"] > far["precision"]
    if mode == "float64":
        assert near["mind"] < far["mind"] and near["density"] > far["density"] and near["coverage"] > far["coverage"]


def test_the_modes_agree_to_their_precision() -> None:
    reference, generated = reference_of([features(800, 0)]), features(400, 1)
    exact, adm = measure(generated, reference), measure(generated, reference, mode="adm")
    assert adm["fd"] == pytest.approx(exact["fd"], rel=1e-5)
    assert adm["precision"] == pytest.approx(exact["precision"], abs=0.02)


def test_a_reference_is_that_of_its_parts_and_survives_its_file(tmp_path: Path) -> None:
    whole = features(500, 0)
    parts = [Features(*(table[i : i + 130] for table in whole.tables().values())) for i in range(0, 500, 130)]
    reference = reference_of(parts)
    reference.save(tmp_path / "new" / "reference.npz")
    found = Reference.load(tmp_path / "new" / "reference.npz")
    assert found.description == DESCRIPTION
    generated = features(300, 1)
    assert measure(generated, found) == measure(generated, reference)
    assert np.allclose(found.gaussian.covariance, np.cov(whole.features.astype(float), rowvar=False), atol=1e-9)


def test_a_large_reference_keeps_the_features_of_some_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "MAX_NEIGHBOURS", 100)
    whole = features(500, 0)
    halves = [Features(whole.features[:250]), Features(whole.features[250:])]
    kept = reference_of(halves).features
    assert len(kept) == 100
    rows = {row.tobytes() for row in whole.features}
    assert all(row.tobytes() in rows for row in kept) and len({row.tobytes() for row in kept}) == 100
    assert np.array_equal(kept, reference_of([Features(whole.features)]).features)


def test_few_images_and_sorted_ones_are_said() -> None:
    reference = reference_of([features(800, 0)])
    generated = Features(features(10, 1).features, np.eye(10, dtype=np.float32))
    sorted_set = Features(np.tile(features(10, 1).features, (9, 1)), np.eye(10, dtype=np.float32).repeat(9, 0))
    assert "10 images for 12 features" in cautions(generated, reference, {})[0]
    assert "sorted" in cautions(sorted_set, reference, measure(sorted_set, reference))[0]
    assert cautions(features(100, 2), reference, measure(features(100, 2), reference)) == []


def test_a_reference_of_other_features_or_sizes_is_refused(tmp_path: Path) -> None:
    reference = reference_of([features(30, 0)])
    mine, other = (Extractor("mine", letter * 64, lambda x: (x,)) for letter in "ab")
    reference.check(mine, 16)
    with pytest.raises(ValueError, match="made with extractor mine aaaaaaaaaaaa, not with mine bbbbbbbbbbbb"):
        reference.check(other, 16)
    with pytest.raises(ValueError, match="of images of 16 pixels, these have 32"):
        reference.check(mine, 32)
    with pytest.raises(FileNotFoundError, match="no such reference; make it with"):
        Reference.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="is no reference of `evaluate.py reference`"):
        Reference.load(tmp_path / "other.npz")
