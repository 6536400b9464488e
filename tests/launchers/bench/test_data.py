"""The data benchmark reads real shards, all of them, by each of its contestants."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Study

from data_pipeline.loading.datasets import CodeDataset
from launchers.bench import data
from launchers.bench.config import BenchmarkConfig
from launchers.bench.data import benchmark_data, code_calls, image_calls, make_folders, one_core, random_crop
from models.scales import PATCH_NUMS_256


def test_every_call_handles_the_whole_data_set(study: Study, tmp_path: Path) -> None:
    for calls in (
        code_calls(study.folder / "codes/train"),
        image_calls(study.folder / "images/train", tmp_path / "files"),
    ):
        handled = {name: call() for name, call in calls.items()}
        assert len(handled) > 6 and min(handled.values()) >= 12, handled


@pytest.mark.slow
def test_reading_is_timed_beside_what_others_do(study: Study) -> None:
    config = BenchmarkConfig(what="data", folder=str(study.folder / "images/train"), repeats=1)
    rows = {row["name"]: row for row in benchmark_data(config)}
    assert rows["images, as a run reads them, one core"]["ratio"] == 1.0
    assert "images, webdataset and Pillow, 2 processes" in rows


def test_made_folders_hold_codes_of_the_paper_and_pictures_that_need_no_scaling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CODE_SAMPLES", "VIEWED_SAMPLES", "IMAGE_SAMPLES", "CODE_SHARDS"):
        monkeypatch.setattr(data, name, 2 if name == "CODE_SHARDS" else 6)
    codes, viewed, images = make_folders(tmp_path, BenchmarkConfig(what="data"))
    for folder in (codes, viewed):
        dataset = CodeDataset(folder, patch_nums=PATCH_NUMS_256, vocab_size=4096, tokenizer_sha256=None)
        read, labels = dataset.read(np.arange(6), np.zeros(6, np.int64))
        assert read.shape == (6, 680) and read.max() > 3000 and labels.tolist() == list(range(6))
        assert dataset.shard_sizes == (3, 3)
    data.write_files(images, tmp_path / "files")
    files = sorted((tmp_path / "files").glob("*/*"))
    assert [file.parent.name for file in files] == [f"{label:04d}" for label in range(6)]
    with Image.open(files[0]) as image:
        assert image.format == "JPEG" and min(image.size) == data.TRANSFORM.short_side


def test_a_crop_is_what_models_take() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (288, 289, 3), dtype=np.uint8)
    view = random_crop(Image.fromarray(pixels))
    assert view.shape == (3, 256, 256) and view.dtype == torch.float32 and view.is_contiguous()
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1
    places = [whole[:, y : y + 256, x : x + 256] for y in range(33) for x in range(34)]
    assert sum(torch.allclose(view, place, atol=1e-6) for place in places) == 1


def test_one_core_holds_what_it_starts_and_lets_go() -> None:
    before, threads, found = os.sched_getaffinity(0), torch.get_num_threads(), []
    with one_core():
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 1
    assert len(found[0]) == 1 and os.sched_getaffinity(0) == before and torch.get_num_threads() == threads
