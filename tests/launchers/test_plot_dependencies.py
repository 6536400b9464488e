"""Fig. 9: the numbers beside the picture are those of the images in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import ONE_TO_ONE, Study, command

from launchers import plot_dependencies
from launchers.plot_dependencies import DependencyConfig
from launchers.setup.assembly import open_images
from launchers.setup.loading import load_tokenizer
from launchers.setup.settings import DataConfig
from training.laws.dependency import bidirectionality


def figure_config(study: Study, out: Path, **settings: Any) -> DependencyConfig:
    paths = {"tokenizer": str(study.folder / "tokenizer"), "images": str(study.folder / "images" / "val")}
    return DependencyConfig(**(paths | {"out": str(out), "num_images": 3, "views": ONE_TO_ONE} | settings))


def test_the_figure_and_its_numbers_are_written(study: Study, tmp_path: Path) -> None:
    config = figure_config(study, tmp_path / "new" / "9.png")
    plot_dependencies.launch(command(config))
    with Image.open(config.out) as figure:
        assert min(figure.size) > 500
    report = json.loads((tmp_path / "new" / "9.json").read_text())
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    images = open_images(config.images, tokenizer.config, DataConfig(views=config.views), seed=0, random_views=False)
    shown, _ = images.read(np.array(report["samples"]), np.zeros(3, np.int64))
    # 1e-5: convolutions of one image and of three sum in another order
    assert report["bidirectionality"] == pytest.approx(bidirectionality(tokenizer.token_dependency(shown)), rel=1e-5)
    assert report["mean_bidirectionality"] == pytest.approx(np.mean(report["bidirectionality"]))
    assert report["tokenizer_sha256"] == sha256
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["9.json", "9.png"]


def test_the_choice_of_images_is_a_function_of_the_seed(study: Study, tmp_path: Path) -> None:
    config = figure_config(study, tmp_path / "9.png", num_images=8)
    first = plot_dependencies.choose(1000, config)
    assert len(set(first.tolist())) == 8
    assert np.array_equal(first, plot_dependencies.choose(1000, config))
    assert not np.array_equal(first, plot_dependencies.choose(1000, replace(config, seed=1)))


def test_a_dry_run_draws_nothing(study: Study, tmp_path: Path) -> None:
    plot_dependencies.launch(command(figure_config(study, tmp_path / "9.png"), dry_run=True))
    assert list(tmp_path.iterdir()) == []


def test_more_images_than_there_are_cannot_be_chosen(study: Study, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_images is 16; .*images/val has 6"):
        plot_dependencies.launch(command(figure_config(study, tmp_path / "9.png", num_images=16)))
