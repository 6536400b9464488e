"""launchers/demo.py: its commands are the project's own, and its measures are right."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from launchers.command_line import load_config
from launchers.config import TokenizerConfig, TrainConfig
from launchers.demo import DemoConfig, plan_stages, run_command, within_class_variance


def test_variance_within_classes_has_its_closed_form() -> None:
    levels = np.array([0, 255, 0, 51], np.uint8)  # as grey values 0, 1, 0 and 0.2
    images = np.broadcast_to(levels[:, None, None, None], (4, 2, 3, 3))
    labels = np.array([7, 7, 9, 9])
    # variances 1/4 and 0.01, summed over the 2 x 3 pixels, averaged over the two classes
    assert within_class_variance(images, labels) == pytest.approx(6 * (0.25 + 0.01) / 2)


def test_copies_of_one_image_per_class_have_no_variance() -> None:
    images = np.broadcast_to(np.array([3, 3, 200], np.uint8)[:, None, None, None], (3, 4, 4, 3))
    assert within_class_variance(images, np.array([0, 0, 1])) == 0


def test_the_demo_consists_of_the_projects_own_commands_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    stages = plan_stages(DemoConfig())
    assert list(stages) == ["pack_images", "train_tokenizer", "encode_codes", "train", "sample"]
    for name, line in stages.items():
        script = next(word for word in line if word.endswith(".py"))
        assert Path(script).is_file() and Path(script).stem == name
    run = load_config(TrainConfig, DemoConfig().transformer).run
    assert f"run={run}" in stages["sample"] and DemoConfig().transformer in stages["train"]
    tokenizer = load_config(TokenizerConfig, DemoConfig().tokenizer).run
    assert f"tokenizer={tokenizer}" in stages["encode_codes"]


def test_a_stage_of_the_demo_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="stage nap ended with exit code 1"):
        run_command("nap", [shutil.which("false")])
