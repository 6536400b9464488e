"""launchers/demo.py: its commands are the project's own, and its measures are right."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT

from launchers.demo import (
    LAUNCHERS,
    DemoConfig,
    generated_folder,
    plan_stages,
    read_generated,
    run_command,
    within_class_variance,
)
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig
from launchers.train_tokenizer import TokenizerConfig


@pytest.mark.parametrize("gpus, processes", [(0, "2"), (1, "1"), (8, "2")])
def test_as_many_processes_train_as_have_a_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: str) -> None:
    """NCCL refuses two on one. Without any GPU they share the cores."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # left by tests that train
    line = plan_stages(DemoConfig())["train"]
    assert line[line.index("--num_gpus") + 1] == processes


def test_variance_within_classes_has_its_closed_form() -> None:
    levels = np.array([0, 255, 0, 51], np.uint8)  # as grey values 0, 1, 0 and 0.2
    images = np.broadcast_to(levels[:, None, None, None], (4, 2, 3, 3))
    labels = np.array([7, 7, 9, 9])
    # variances 1/4 and 0.01, summed over the 2 x 3 pixels, averaged over the two classes
    assert within_class_variance(images, labels) == pytest.approx(6 * (0.25 + 0.01) / 2)


def test_copies_of_one_image_per_class_have_no_variance() -> None:
    images = np.broadcast_to(np.array([3, 3, 200], np.uint8)[:, None, None, None], (3, 4, 4, 3))
    assert within_class_variance(images, np.array([0, 0, 1])) == 0


def test_generated_images_are_read_class_by_class_from_the_shuffled_file(tmp_path: Path) -> None:
    config = DemoConfig(out=str(tmp_path))
    generated_folder(config).mkdir()
    labels = np.array([1, 0, 1, 0])
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] + np.zeros((4, 2, 2, 3), np.uint8)
    np.savez(generated_folder(config) / "samples.npz", arr_0=images, labels=labels)
    read, read_labels = read_generated(config)
    assert read_labels.tolist() == [0, 0, 1, 1] and read[:, 0, 0, 0].tolist() == [1, 3, 0, 2]


def test_the_demo_consists_of_the_projects_own_commands_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
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


@pytest.mark.slow
def test_the_demo_reaches_what_the_readme_says(tmp_path: Path) -> None:
    """About six minutes: the whole demo in a folder of its own, and the pictures it promises."""
    demo = [sys.executable, str(LAUNCHERS / "demo.py")]
    configs = [f"{name}={ROOT / getattr(DemoConfig(), name)}" for name in ("tokenizer", "transformer")]
    done = subprocess.run([*demo, *configs], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / DemoConfig().out
    report = json.loads((folder / "report.json").read_text())
    accuracy = report["accuracy"]
    assert accuracy["real"] >= 0.97 and accuracy["reconstructed"] >= 0.95 and accuracy["generated"] >= 0.9
    assert accuracy["completed"] >= 0.9 and report["kept_codes_unchanged"]
    for name in ("samples", "reconstructions", "completions", "digit"):
        assert (folder / f"{name}.png").is_file()
