"""launchers/sample.py: a folder of images is a function of its settings, however often the command was killed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    PATCH_NUMS,
    VAR_CONFIG,
    VQVAE_CONFIG,
    Study,
    command,
    make_tokenizer,
    train_var,
    write_public_files,
)

from launchers import sample
from launchers.sample import SampleConfig
from launchers.sampling.files import NpzFiles, PngFiles
from models.var import VAR, VARConfig
from training.checkpoints.model_on_disk import describe, write_model
from training.engine.engine import PRECISIONS


@pytest.fixture(scope="module")
def run(study: Study) -> str:
    config = study.train_config("sampled", stop_after_steps=1)
    train_var(config)
    return config.run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An unconditional one."""
    return write_pair(tmp_path_factory.mktemp("model"), replace(VAR_CONFIG, num_classes=0))


def launch(run: str, out: Path | str, **settings: Any) -> None:
    """9 images in 3 units, unless `settings` say otherwise."""
    given = {"per_class": 3, "batch": 4} | settings
    sample.launch(command(SampleConfig(run=run, out=str(out), **given)))


def write_pair(folder: Path, config: VARConfig) -> str:
    """An exported model: a transformer with its tokenizer beside it."""
    write_model(folder, VAR(config).state_dict(), describe(config))
    write_model(folder / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_png_and_npz_hold_the_same_images(run: str, tmp_path: Path) -> None:
    launch(run, tmp_path / "png")
    launch(run, tmp_path / "npz", format="npz")
    with np.load(tmp_path / "npz" / "samples.npz") as found:
        images, labels = found["arr_0"], found["labels"]
    assert images.shape == (9, 8, 8, 3) and sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for label in range(3):
        files = sorted((tmp_path / "png" / "png" / f"{label:05d}").iterdir())
        assert len(files) == 3
        pngs = [np.asarray(Image.open(path)).tobytes() for path in files]
        assert sorted(pngs) == sorted(image.tobytes() for image in images[labels == label])
    assert contents(tmp_path / "npz").keys() == {"samples.json", "samples.npz", "samples.png"}
    assert contents(tmp_path / "npz")["samples.png"] == contents(tmp_path / "png")["samples.png"]


@pytest.mark.parametrize("format, files", [("png", PngFiles), ("npz", NpzFiles)])
def test_a_sampling_that_was_killed_ends_as_one_that_was_not(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, files: type
) -> None:
    launch(run, tmp_path / "whole", format=format)
    write = files.write

    def die_in_unit_1(self: Any, unit: int, images: np.ndarray) -> None:
        if unit == 1:
            raise KeyboardInterrupt
        write(self, unit, images)

    monkeypatch.setattr(files, "write", die_in_unit_1)
    with pytest.raises(KeyboardInterrupt):
        launch(run, tmp_path / "killed", format=format)
    assert not (tmp_path / "killed" / "samples.png").exists()
    drawn = []
    monkeypatch.setattr(files, "write", lambda self, unit, images: (drawn.append(unit), write(self, unit, images)))
    launch(run, tmp_path / "killed", format=format)
    assert drawn == [1, 2]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_images_that_were_deleted_are_drawn_again_as_they_were(run: str, tmp_path: Path) -> None:
    launch(run, tmp_path)
    before = contents(tmp_path)
    for name in ("png/00001/0000002.png", "png/00002/0000000.png", "samples.png"):
        (tmp_path / name).unlink()
    launch(run, tmp_path)
    assert contents(tmp_path) == before


def test_a_kill_between_the_npz_and_the_end_costs_nothing(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts are there and the grid is not, or the npz is there and the parts still are."""
    launch(run, tmp_path / "whole", format="npz")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "draw_grid", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        launch(run, tmp_path / "killed", format="npz")
    assert len(list((tmp_path / "killed" / "parts").iterdir())) == 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda *arguments, **more: (_ for _ in ()).throw(KeyboardInterrupt))
        launch(run, tmp_path / "killed", format="npz")
    launch(run, tmp_path / "killed", format="npz")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_finished_folder_is_left_alone(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    launch(run, tmp_path, format=format)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    launch(run, tmp_path, format=format)
    assert capsys.readouterr().out == f"{tmp_path} has all 9 images; nothing to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "change",
    [
        *[{"cfg": 2.0}, {"guidance": (0.0, 1.0)}, {"top_k": 3}, {"top_p": 0.5}, {"smooth": True}],
        *[{"precision": "bf16"}, {"classes": (0, 1)}, {"per_class": 4}, {"seed": 1}, {"batch": 3}, {"format": "npz"}],
    ],
)
def test_other_settings_need_another_folder(run: str, tmp_path: Path, change: dict[str, Any]) -> None:
    launch(run, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"its images have {next(iter(change))} .*out=PATH, or remove {tmp_path}"):
        launch(run, tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_cfg_that_guidance_takes_the_place_of_does_not_matter(run: str, tmp_path: Path) -> None:
    launch(run, tmp_path, guidance=(0.0, 1.0), cfg=3.0)
    launch(run, tmp_path, guidance=(0.0, 1.0))


def test_another_model_needs_another_folder(run: str, tmp_path: Path) -> None:
    launch(run, tmp_path / "out")
    with pytest.raises(ValueError, match="its images have var_sha256 [0-9a-f]{64}, this command has"):
        launch(write_pair(tmp_path / "model", VAR_CONFIG), tmp_path / "out")


def test_the_images_of_a_run_lie_in_it_unless_told_otherwise(run: str, tmp_path: Path) -> None:
    launch(run, "")
    assert (Path(run) / "samples" / "samples.png").is_file()
    (tmp_path / "var_d16.pth").touch()
    assert sample.out_folder(SampleConfig(run=str(tmp_path / "var_d16.pth"))) == Path("samples/var_d16")


def test_the_grid_goes_to_the_tracker_that_is_named(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, Path, str]] = []
    monkeypatch.setattr(sample, "log_picture", lambda *given, group: logged.append(given))
    launch(run, tmp_path / "out", tracking_uri="http://tracker")
    assert logged == [(run, tmp_path / "out" / "samples.png", "http://tracker")]


def test_a_dry_run_writes_nothing(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SampleConfig(run=run, out=str(tmp_path / "out"), per_class=3, batch=4)
    sample.launch(replace(command(config), dry_run=True))
    assert f"would draw 9 images into {tmp_path / 'out'}, in 3 batches of 4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_public_checkpoint_is_sampled_as_the_model_that_it_is(tmp_path: Path) -> None:
    var, tokenizer = write_public_files(tmp_path)
    launch(var, tmp_path / "public", tokenizer=tokenizer, patch_nums=PATCH_NUMS)
    launch(write_pair(tmp_path / "model", VAR_CONFIG), tmp_path / "ours")
    assert contents(tmp_path / "public" / "png") == contents(tmp_path / "ours" / "png")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_that_of_the_transformer_and_never_of_the_quantizer(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    samplers: list[Any] = []
    draw_all = sample.draw_all
    monkeypatch.setattr(sample, "draw_all", lambda sampler, *rest: (samplers.append(sampler), draw_all(sampler, *rest)))
    launch(run, tmp_path, precision=precision)
    assert {parameter.dtype for parameter in samplers[0].var.parameters()} == {PRECISIONS[precision]}
    assert {parameter.dtype for parameter in samplers[0].tokenizer.quantizer.parameters()} == {torch.float32}
    assert len(list((tmp_path / "png").rglob("*.png"))) == 9


class TestUnconditional:
    """A model without classes: images are counted by per_class, and there is nothing to guide towards."""

    def test_the_plain_command_draws_per_class_images_of_class_0(self, model: str, tmp_path: Path) -> None:
        launch(model, tmp_path, per_class=7, format="npz")
        with np.load(tmp_path / "samples.npz") as found:
            assert found["labels"].tolist() == [0] * 7 and found["arr_0"].shape == (7, 8, 8, 3)
        assert json.loads((tmp_path / "samples.json").read_text())["cfg"] == 0

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"cfg": 4.0}, "cfg is 4.0; an unconditional model has no class to guide towards, so leave cfg out"),
            ({"guidance": (0.0, 1.0)}, r"guidance is \(0.0, 1.0\); an unconditional model"),
            ({"classes": (0,)}, "unconditional, so leave classes out"),
        ],
    )
    def test_what_needs_classes_is_refused(
        self, model: str, tmp_path: Path, settings: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            launch(model, tmp_path / "out", **settings)
        assert not (tmp_path / "out").exists()


def test_guidance_of_another_number_of_scales_is_refused_before_anything_is_drawn(run: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 strengths, the model 2 scales"):
        launch(run, tmp_path / "out", guidance=(0.0, 1.0, 2.0))
    assert not (tmp_path / "out").exists()


def test_guidance_may_be_given_per_scale(run: str, tmp_path: Path) -> None:
    """The ramp to cfg over two scales is (0, cfg)."""
    launch(run, tmp_path / "ramp", cfg=3.0)
    launch(run, tmp_path / "listed", guidance=(0.0, 3.0))
    assert contents(tmp_path / "ramp" / "png") == contents(tmp_path / "listed" / "png")


def test_a_run_is_not_sampled_with_another_tokenizer(run: str, tmp_path: Path) -> None:
    write_model(tmp_path, make_tokenizer(seed=1).state_dict(), describe(VQVAE_CONFIG))
    with pytest.raises(ValueError, match="was trained with tokenizer [0-9a-f]{12}, this one is [0-9a-f]{12}"):
        launch(run, "", tokenizer=str(tmp_path))
