"""What a user can get wrong in a project with data and runs: one line on stderr that says what and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from project import ForkedProject, Project, train_arguments
from tiny import VAR_CONFIG, write_public_files

from launchers.setup.loading import load_tokenizer
from models.var import VAR
from training.checkpoints.model_on_disk import describe, write_model

TRAIN = ("train", *train_arguments("runs/x"))
AGAIN = ("train", *train_arguments("runs/whole"))  # a run that has a checkpoint
PLOT = ("plot_dependencies", "--tokenizer", "runs/digits/tokenizer", "--out", "x.png")
SIZES = ("compare_sizes", "--out", "x.png", "--runs")
# command line; what the one line says; all end with exit code 64
WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown key": ((*TRAIN, "model.dept=4"), ("model.dept", "did you mean 'model.depth'")),
    "no tokenizer": ((*TRAIN, "tokenizer=nowhere"), ("nowhere: no such file or folder",)),
    "other classes": ((*TRAIN, "model.num_classes=5"), ("has 10 classes, model.num_classes is 5",)),
    "another seed": ((*AGAIN, "seed=9"), ("seed is 0, this run has 9",)),
    "another model": ((*AGAIN, "model.depth=3"), ("depth is 2, this run has 3",)),
    "a stage not kept": ((*SIZES, "runs/whole", "--stages", "0.4"), ("within 0.05 of stage 0.4", "loop.keep_at")),
    "no run to compare": ((*SIZES, "nowhere"), ("nowhere: no such file or folder",)),
    "codes to plot": ((*PLOT, "--images", "data/digits/codes/val"), ("holds codes, expected images",)),
    "no file to import": (("import_weights", "--var", "gone.pth", "--out", "o"), ("gone.pth: no such file",)),
    "nothing to export": (("export_weights", "--run", "nowhere", "--out", "o"), ("nowhere: no such file or folder",)),
    "an export to a folder in use": (
        ("export_weights", "--run", "runs/digits/tokenizer", "--out", "data"),
        ("data: is not empty",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_is_one_line(trained: Project, name: str) -> None:
    (launcher, *arguments), words = WRONG[name]
    line = trained.fail(launcher, *arguments)
    assert all(word in line for word in words), line
    assert not (trained.folder / "o").exists()


@pytest.fixture
def public(tmp_path: Path) -> Path:
    write_public_files(tmp_path)
    return tmp_path


def test_an_empty_folder_cannot_be_packed(project: Project) -> None:
    (project.folder / "empty").mkdir()
    assert "empty" in project.fail("pack_images", "source=empty", "out=packed")


def test_a_shard_cut_short_is_named(project: Project) -> None:
    shutil.copytree(project.folder / "data/digits/codes/train", project.folder / "cut")
    shard = next((project.folder / "cut").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert shard.name in project.fail(*TRAIN, "data.train=cut", code=65)


def test_codes_of_another_tokenizer_are_refused(project: Project) -> None:
    shutil.copytree(project.folder / "data/digits/codes/train", project.folder / "foreign")
    index = project.folder / "foreign" / "index.json"
    meta = json.loads(index.read_text())
    meta["meta"]["tokenizer_sha256"] = "0" * 64
    index.write_text(json.dumps(meta))
    line = project.fail(*TRAIN, "data.train=foreign")
    assert "0000" in line and "encode_codes.py" in line


def test_a_batch_that_the_world_does_not_divide_is_refused(project: ForkedProject) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    line = project.fail_as_rank(*TRAIN, env=world)
    assert "global_batch 64 is not divisible by the world size 3" in line


def test_a_run_is_not_sampled_with_another_tokenizer(trained: Project) -> None:
    other, _ = load_tokenizer(str(trained.folder / "runs/digits/tokenizer"))
    other.quantizer.codebook += 1
    write_model(trained.folder / "runs/other", other.state_dict(), describe(other.config))
    assert "was trained with tokenizer" in trained.fail("sample", "run=runs/whole", "tokenizer=runs/other")


def test_damaged_and_wrong_files_are_not_imported(project: Project, public: Path) -> None:
    (public / "cut.pth").write_bytes((public / "var_d1.pth").read_bytes()[:-1000])
    torch.save({"weights": [torch.zeros(2)]}, public / "list.pth")
    weights = torch.load(public / "var_d1.pth")
    torch.save({name: value for name, value in weights.items() if name != "head.bias"}, public / "no_head.pth")
    sides = ("--patch-nums", "1", "2")
    for name, more, message in (
        ("cut.pth", (), "get it again"),
        ("list.pth", (), "a flat state dict"),
        ("vae_ch32v16z4.pth", (), "no pos_1LC"),
        ("no_head.pth", sides, "missing head.bias"),
        ("var_d1.pth", (), "add --patch-nums"),
        ("var_d1.pth", ("--patch-nums", "1", "3"), "5 positions"),
    ):
        line = project.fail("import_weights", "--var", str(public / name), "--out", "o", *more)
        assert name in line and message in line
    arguments = ["--tokenizer", str(public / "vae_ch32v16z4.pth"), *sides]
    assert "data: is not empty" in project.fail("import_weights", *arguments, "--out", "data")


def test_training_does_not_start_from_a_public_file_or_a_model_of_other_sizes(project: Project, public: Path) -> None:
    line = project.fail(*TRAIN, "--init-from", str(public / "var_d1.pth"))
    assert "launchers/import_weights.py --var" in line
    write_model(public / "d1", VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    assert "its depth is 1, this run has 2" in project.fail(*TRAIN, "--init-from", str(public / "d1"))


def test_a_corrupt_image_is_skipped_counted_and_named(project: ForkedProject) -> None:
    for label in ("cat", "dog"):
        (project.folder / "photos" / label).mkdir(parents=True)
        for number in range(4):
            picture = Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8))
            picture.save(project.folder / "photos" / label / f"{number}.png")
    (project.folder / "photos/cat/broken.jpg").write_bytes(b"\xff\xd8\xff not a photograph")
    said = project.forked("pack_images", "source=photos", "out=photo_shards", "val_fraction=0.25")
    assert "1 skipped" in said and "broken.jpg" in said
