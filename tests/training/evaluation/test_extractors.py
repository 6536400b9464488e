"""Extractors: an image's features are its own, and only the right weights are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from models.inception import InceptionV3
from training.evaluation.extractors import Extractor, Features, load_extractor


def images(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)


def test_the_default_needs_no_file_and_names_photographs() -> None:
    extractor = load_extractor("lite0")
    seen = extractor.extract(np.stack(load_sample_images().images))
    assert seen.features.shape == (2, 1280) and seen.spatial is None
    assert seen.probabilities.argmax(1).tolist() == [698, 985]
    assert np.allclose(seen.probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_features_depend_on_neither_neighbours_nor_threads(threads: int) -> None:
    extractor, batch = load_extractor("lite0"), images(5)
    alone = Features.join([extractor.extract(batch[i : i + 1]) for i in range(5)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = extractor.extract(batch)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, table in alone.tables().items():
        assert np.array_equal(table, together.tables()[name]), name


def test_a_torchscript_module_is_an_extractor(tmp_path: Path) -> None:
    module = torch.jit.script(Means())
    module.save(str(tmp_path / "means.pt"))
    seen = load_extractor("torchscript", str(tmp_path / "means.pt")).extract(images(3))
    assert np.allclose(seen.features, images(3).mean((1, 2)), rtol=1e-5)
    assert seen.probabilities is None


def test_inception_sees_for_three_measures(tmp_path: Path) -> None:
    torch.save(InceptionV3().state_dict(), tmp_path / "inception.pth")
    seen = load_extractor("inception", str(tmp_path / "inception.pth")).extract(images(1))
    assert seen.features.shape == (1, 2048) and seen.probabilities.shape == (1, 1008)
    assert seen.spatial.shape == (1, 2023)


class Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("other", b"", ValueError, "extractor is other; accepted: lite0, inception, torchscript"),
        ("inception", None, FileNotFoundError, "needs its weights; name the file with weights=FILE"),
        ("lite0", b"other weights", ValueError, "that of EfficientNet-Lite0 is 579344248a93"),
        ("inception", b"no weights", ValueError, "does not hold the weights of InceptionV3"),
        ("torchscript", b"no script", ValueError, "is no TorchScript file"),
    ],
)
def test_what_is_no_extractor_is_refused(
    name: str, content: bytes | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content or b"")
    with pytest.raises(error, match=message):
        load_extractor(name, "" if content is None else str(path))


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8)])
def test_what_are_no_images_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 of \(N, H, W, 3\) are needed"):
        load_extractor("lite0").extract(wrong)


def test_a_network_of_another_shape_is_refused() -> None:
    extractor = Extractor("mine", "0" * 64, lambda x: (x.float(),))
    with pytest.raises(ValueError, match="mine gave a tensor"):
        extractor.extract(images(1))
