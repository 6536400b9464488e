"""launchers/evaluate.py: the same numbers on any number of ranks, and wrong sets of images refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_world import ForkServer
from PIL import Image
from project import ForkedProject
from tiny import VQVAE_CONFIG, Study

from launchers.setup.loading import load_tokenizer

SIDE = 8


class Patches(torch.nn.Module):
    """A tiny extractor: means of quarters of the image as features, their colours as logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2)
        return means.flatten(1), 20 * means.mean((2, 3))


def draw(count: int, seed: int, contrast: int = 128) -> np.ndarray:
    colours = np.random.default_rng(seed).integers(0, contrast, size=(count, 2, 2, 3))
    return colours.repeat(SIDE // 2, 1).repeat(SIDE // 2, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> ForkedProject:
    """A folder with an extractor, 700 real images and their reference, and 600 generated ones of ten classes."""
    folder = tmp_path_factory.mktemp("evaluated")
    torch.jit.script(Patches()).save(str(folder / "patches.pt"))
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 60))
    np.savez(folder / "real.npz", arr_0=draw(700, 0))
    np.savez(folder / "generated.npz", arr_0=draw(600, 1, contrast=200), labels=labels)
    project = ForkedProject(folder, fork_server)
    project.forked("evaluate", "reference", "images=real.npz", "out=reference.npz", *EXTRACTOR)
    return project


EXTRACTOR = ("extractor=torchscript", "weights=patches.pt")
SAMPLES = ("samples", "images=generated.npz", "reference=reference.npz", *EXTRACTOR)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one_process_to_the_last_digit(project: ForkedProject, ranks: int) -> None:
    project.forked("evaluate", *SAMPLES, "out=alone.json")
    project.forked("evaluate", *SAMPLES, f"out={ranks}.json", ranks=ranks)
    assert (project.folder / "alone.json").read_bytes() == (project.folder / f"{ranks}.json").read_bytes()
    assert not list(project.folder.glob("*.parts"))


def test_what_a_killed_evaluation_left_changes_nothing(project: ForkedProject) -> None:
    said = project.forked("evaluate", *SAMPLES, "out=first.json")
    parts = project.folder / "second.parts"
    parts.mkdir()
    (parts / "0.npz").write_bytes(b"cut off")
    project.forked("evaluate", *SAMPLES, "out=second.json")
    first = json.loads((project.folder / "first.json").read_text())
    assert first == json.loads((project.folder / "second.json").read_text())
    assert "fd (torchscript)" in said
    assert first["images"]["count"] == 600 and first["images"]["classes"] == 10
    assert first["extractor"]["sha256"] == first["reference"]["extractor_sha256"]


def test_real_images_are_nearer_than_drawn_ones(project: ForkedProject) -> None:
    np.savez(project.folder / "held_out.npz", arr_0=draw(600, 7))
    project.forked("evaluate", *SAMPLES, "images=held_out.npz", "out=held_out.json")
    project.forked("evaluate", *SAMPLES, "out=generated.json")
    near, far = (
        json.loads((project.folder / f"{name}.json").read_text())["measures"] for name in ("held_out", "generated")
    )
    assert near["fd"] < far["fd"] / 10 and near["mind"] < far["mind"] / 10 and near["coverage"] > far["coverage"]


def test_a_folder_of_pictures_gives_what_its_npz_gives(project: ForkedProject) -> None:
    images = draw(40, 5)
    for number, image in enumerate(images):
        path = project.folder / "pictures" / f"{number % 4}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    order = sorted(range(40), key=lambda number: (number % 4, number))
    np.savez(project.folder / "pictures.npz", arr_0=images[order])
    measures = []
    for source in ("pictures", "pictures.npz"):
        project.forked("evaluate", *SAMPLES, f"images={source}", f"out={source}.json")
        measures.append(json.loads((project.folder / f"{source}.json").read_text())["measures"])
    assert measures[0] == measures[1]


def test_wrong_sets_are_refused_in_one_line(project: ForkedProject) -> None:
    folder = project.folder
    images, labels = draw(50, 3), np.repeat(np.arange(5), 10)
    np.savez(folder / "uneven.npz", arr_0=images, labels=np.where(np.arange(50) == 0, 1, labels))
    np.savez(folder / "grey.npz", arr_0=images[..., 0])
    np.savez(folder / "larger.npz", arr_0=images.repeat(2, 1).repeat(2, 2))
    (folder / "cut.npz").write_bytes((folder / "generated.npz").read_bytes()[:1000])
    (folder / "mixed").mkdir()
    Image.fromarray(images[0]).save(folder / "mixed" / "a.png")
    Image.fromarray(images[0, :7, :7]).save(folder / "mixed" / "b.png")
    (folder / "grey").mkdir()
    Image.fromarray(images[0, ..., 0]).save(folder / "grey" / "a.png")
    (folder / "started" / "parts").mkdir(parents=True)
    (folder / "empty").mkdir()
    for change, message in {
        "count=599": "600 images, count is 599",
        "images=uneven.npz": "class 0 has 9 images, most have 10",
        "images=grey.npz": "arr_0 is uint8 of shape (50, 8, 8)",
        "images=larger.npz": "the reference is of images of 8 pixels, these have 16",
        "images=cut.npz": "is no npz file with images in arr_0",
        "images=mixed": "b.png: is RGB of 7 x 7 pixels; RGB of 8 x 8",
        "images=grey": "a.png: is L of 8 x 8 pixels",
        "images=started": "is a sampling that is not finished",
        "images=empty": "holds no pictures",
        "images=nowhere": "no such file or folder",
        "reference=nowhere.npz": "no such reference; make it with",
        "extractor=lite0": "sha256 is",
        "mode=exact": "mode is exact",
    }.items():
        assert message in project.fail("evaluate", *SAMPLES, change), change
    assert "'measure' is no verb" in project.fail("evaluate", "measure")


def test_a_tokenizer_is_measured_alike_on_two_ranks(study: Study, fork_server: ForkServer, tmp_path: Path) -> None:
    side = VQVAE_CONFIG.image_size
    images = np.random.default_rng(0).integers(0, 256, size=(300, side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / "held_out.npz", arr_0=images)
    project = ForkedProject(tmp_path, fork_server)
    arguments = ("tokenizer", f"run={study.folder / 'tokenizer'!s}", "images=held_out.npz")
    project.forked("evaluate", *arguments, "out=one.json")
    project.forked("evaluate", *arguments, "out=two.json", ranks=2)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    measures = json.loads((tmp_path / "one.json").read_text())["measures"]
    tokenizer, _ = load_tokenizer(str(study.folder / "tokenizer"))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    codes = tokenizer.encode(batch)
    error = (tokenizer.decode(codes) - batch).mul(127.5).square().mean((1, 2, 3))
    assert measures["psnr"] == pytest.approx((10 * (255**2 / error).log10()).mean().item(), abs=0.01)
    used = [len(part.unique()) for part in tokenizer.scales.split(codes)]
    assert measures["codes_used"] == used


def test_what_a_tokenizer_keeps_is_at_zero_from_its_own_reference(
    study: Study, fork_server: ForkServer, tmp_path: Path
) -> None:
    side, tokenizer = VQVAE_CONFIG.image_size, study.folder / "tokenizer"
    np.savez(tmp_path / "few.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, side, side, 3), dtype=np.uint8))
    project = ForkedProject(tmp_path, fork_server)
    project.forked("evaluate", "reference", "images=few.npz", "out=kept.npz", f"tokenizer={tokenizer}")
    project.forked("evaluate", "tokenizer", f"run={tokenizer}", "images=few.npz", "reference=kept.npz", "out=kept.json")
    assert json.loads((tmp_path / "kept.json").read_text())["measures"]["rfd"] == pytest.approx(0, abs=1e-6)
