"""Fig. 7: the right checkpoint for every stage, the same seeds and the same forced scales in every cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ONE_TO_ONE, VAR_CONFIG, VQVAE_CONFIG, Study, command, make_tokenizer, train_var

from launchers import compare_sizes
from launchers.compare_sizes import CompareSizesConfig, default_classes, draw_images, find_snapshot, force_scales
from launchers.setup.assembly import Models, load_models, open_images
from launchers.setup.settings import DataConfig
from models.var import VAR, VARConfig
from training.checkpoints.model_on_disk import describe, write_model

STAGES = (0.333, 1.0)  # of the 6 steps of a run


@pytest.fixture(scope="module")
def run(study: Study) -> Path:
    """A run with checkpoints at a third, and, of the usual ones, at the end."""
    config = study.train_config("stages", keep_at=(0.3,))
    state, _ = train_var(config)
    assert state.step == 6
    return Path(config.run)


@pytest.fixture(scope="module")
def imported(study: Study) -> Path:
    """A model with its tokenizer beside it, as an import leaves it: no run."""
    folder = study.folder / "imported"
    write_model(folder, VAR(VAR_CONFIG, seed=3).state_dict(), describe(VAR_CONFIG))
    write_model(folder / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    return folder


def figure_config(*runs: Path, **settings: Any) -> CompareSizesConfig:
    defaults = {"stages": STAGES, "classes": (2, 0), "out": str(runs[0].parent / "figure" / "7.png")}
    return CompareSizesConfig(runs=tuple(map(str, runs)), **(defaults | settings))


def test_a_stage_is_the_checkpoint_at_that_share_of_the_training(run: Path) -> None:
    third, end = (find_snapshot(run, stage, 0.05) for stage in STAGES)
    assert (third.path.name, third.note) == ("step-00000002", "33.3% · step 2")
    assert (end.path.name, end.note) == ("step-00000006", "100.0% · step 6")
    assert find_snapshot(run, 0.4, 0.07).path == third.path


def test_a_stage_without_a_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="within 0.05 of stage 0.6, only at 0.333, 1.000; .*loop.keep_at"):
        find_snapshot(run, 0.6, 0.05)


def test_a_checkpoint_is_no_run(run: Path) -> None:
    with pytest.raises(ValueError, match="step-00000002: is one checkpoint; give its run folder"):
        find_snapshot(run / "checkpoints" / "step-00000002", 1.0, 0.05)


def test_a_model_without_a_run_is_at_the_end_of_its_training(imported: Path, tmp_path: Path) -> None:
    assert find_snapshot(imported, 1.0, 0.05).path == imported
    with pytest.raises(ValueError, match="a model without stages; compare it with --stages 1.0"):
        find_snapshot(imported, 0.2, 0.05)
    with pytest.raises(FileNotFoundError, match="no model there"):
        find_snapshot(tmp_path, 1.0, 0.05)


def test_the_figure_has_a_row_for_every_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = figure_config(run, run)
    compare_sizes.launch(command(config))
    with Image.open(config.out) as figure:
        width, height = figure.size
    assert width > 500 and height > 500
    said = capsys.readouterr().out
    assert said.count("step-00000002") == 2 and said.count("step-00000006") == 2
    assert "mlflow" not in said  # nobody named a tracker


def test_runs_and_imported_models_stand_in_one_figure(run: Path, imported: Path) -> None:
    config = figure_config(run, imported, stages=(1.0,))
    compare_sizes.launch(command(config))
    assert Path(config.out).is_file()


def test_a_dry_run_names_the_checkpoints_and_draws_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare_sizes.launch(command(figure_config(run, out=str(tmp_path / "new" / "7.png")), dry_run=True))
    assert "step-00000002: 33.3%" in capsys.readouterr().out and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_forced_scales_are_those_of_a_real_image_of_the_class(run: Path, study: Study, kind: str) -> None:
    models = load_models(str(run))
    known = force_scales(models, figure_config(run, data=str(study.folder / kind / "val")))
    assert known is not None and known.mask.tolist() == [[True] + 4 * [False]] * 2
    shards = str(study.folder / "images" / "val")
    dataset = open_images(shards, models.tokenizer.config, DataConfig(views=ONE_TO_ONE), seed=0, random_views=False)
    images, labels = dataset.read(np.arange(6), np.zeros(6, np.int64))
    first = [labels.tolist().index(label) for label in (2, 0)]
    assert torch.equal(known.codes, models.tokenizer.encode(images[first]))


def test_all_scales_forced_give_the_real_images_whatever_the_model(run: Path) -> None:
    models = load_models(str(run))
    config = figure_config(run, forced_scales=2)
    known = force_scales(models, config)
    other = replace(models, var=VAR(replace(VAR_CONFIG, init_head=20.0), seed=9).eval())
    assert np.array_equal(draw_images(models, known, config), draw_images(other, known, config))
    assert not np.array_equal(draw_images(models, None, config), draw_images(other, None, config))


def test_a_cell_is_a_function_of_the_seed(run: Path) -> None:
    models, config = load_models(str(run)), figure_config(run, forced_scales=0)
    assert force_scales(models, config) is None
    first = draw_images(models, None, config)
    assert np.array_equal(first, draw_images(models, None, config))
    assert not np.array_equal(first, draw_images(models, None, replace(config, seed=1)))


def test_unconditional_models_are_drawn_without_labels_and_guidance(run: Path) -> None:
    models = load_models(str(run))
    free = Models(VAR(replace(VAR_CONFIG, num_classes=0)).eval(), models.tokenizer, models.tokenizer_sha256)
    config = figure_config(run)
    assert draw_images(free, force_scales(models, config), config).shape == (10, 19, 3)  # two of 8 px side by side


def test_the_classes_are_the_papers_where_the_model_may_be_of_imagenet() -> None:
    assert default_classes(VARConfig(depth=1, num_classes=1000))[:2] == (130, 270)
    assert default_classes(VARConfig(depth=1, num_classes=10)) == tuple(range(9))
    assert default_classes(VARConfig(depth=1, num_classes=0)) == (0,)


def test_runs_of_two_tokenizers_are_refused(run: Path, tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    write_model(tmp_path / "tokenizer", make_tokenizer(seed=1).state_dict(), describe(VQVAE_CONFIG))
    with pytest.raises(ValueError, match="was trained with tokenizer [0-9a-f]{12}, the first run with"):
        compare_sizes.launch(command(figure_config(run, tmp_path, stages=(1.0,), out=str(tmp_path / "7.png"))))


def test_without_a_run_the_data_to_force_from_must_be_named(imported: Path) -> None:
    with pytest.raises(ValueError, match="add --data FOLDER or --forced-scales 0"):
        force_scales(load_models(str(imported)), figure_config(imported, stages=(1.0,)))


def test_a_class_that_the_model_does_not_know_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="classes has 3; this model knows 0 to 2"):
        compare_sizes.launch(command(figure_config(run, classes=(0, 3), forced_scales=0)))


def test_more_scales_than_there_are_cannot_be_forced(run: Path) -> None:
    with pytest.raises(ValueError, match="forced_scales is 3; the models have 2 scales"):
        force_scales(load_models(str(run)), figure_config(run, forced_scales=3))
