"""What is made to be read is what it is said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from tiny import Study

from data_pipeline.loading.datasets import CodeDataset
from launchers.bench.folders import IMAGE_SIDE, files_of, made_codes, made_jpeg
from models.scales import PATCH_NUMS_256
from models.var import VARConfig


def test_made_codes_are_read_as_the_papers(tmp_path: Path) -> None:
    made_codes(tmp_path, VARConfig(depth=16), views=2, samples=6)
    dataset = CodeDataset(tmp_path, patch_nums=PATCH_NUMS_256, vocab_size=4096, tokenizer_sha256=None)
    codes, labels = dataset.read(np.arange(6), np.zeros(6, np.int64))
    assert codes.shape == (6, 680) and codes.max() > 3000 and labels.tolist() == list(range(6))
    assert dataset.shard_sizes == (3, 3)


def test_made_pictures_need_no_scaling(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(made_jpeg(np.random.default_rng(0)))
    with Image.open(tmp_path / "one.jpg") as image:
        assert image.format == "JPEG" and min(image.size) == IMAGE_SIDE


def test_the_files_of_shards_are_their_images_in_folders_of_classes(study: Study, tmp_path: Path) -> None:
    files = sorted(files_of(str(study.folder / "images/train"), tmp_path / "files").glob("*/*"))
    originals = {path.read_bytes(): path.parent.name for path in (study.folder / "pictures").glob("*/*")}
    assert len(files) == 12 and len({path.read_bytes() for path in files}) == 12
    for path in files:
        assert "abc"[int(path.parent.name)] == originals[path.read_bytes()]
