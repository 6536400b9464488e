"""The loaders that stand beside ours see every image, and end at the same kind of batch."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Study

from launchers.bench.folders import files_of
from launchers.bench.loaders import (
    ImageFolder,
    one_core,
    random_crop,
    read_bytes_in_order,
    read_folder,
    read_webdataset,
    take,
)


def shards_of(study: Study) -> list[str]:
    return sorted(map(str, (study.folder / "images/train").glob("*.tar")))


@pytest.mark.parametrize("workers", [0, 1])
def test_each_sees_every_image_once(study: Study, tmp_path: Path, workers: int) -> None:
    files = files_of(str(study.folder / "images/train"), tmp_path)
    assert read_folder(ImageFolder(files), workers=workers) == 12
    assert read_webdataset(shards_of(study), workers=workers) == read_bytes_in_order(shards_of(study)) == 12


def test_a_crop_is_what_models_take() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (288, 300, 3), dtype=np.uint8)
    view = random_crop(Image.fromarray(pixels))
    assert view.shape == (3, 256, 256) and view.dtype == torch.float32 and view.is_contiguous()
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1
    places = [whole[:, y : y + 256, x : x + 256] for y in range(33) for x in range(45)]
    assert sum(torch.allclose(view, place, atol=1e-6) for place in places) == 1


def test_one_core_holds_what_it_starts_and_lets_go() -> None:
    before, found = os.sched_getaffinity(0), []
    with one_core():
        thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 1
    assert len(found[0]) == 1 and os.sched_getaffinity(0) == before


def test_what_reads_ahead_is_closed_also_by_an_error() -> None:
    class Batches:
        labels, is_closed = (0, 0), False

        def __next__(self) -> Batches:
            return self

        def close(self) -> None:
            self.is_closed = True

    batches = Batches()
    assert take(batches, 3, lambda batch: batch) == 6 and batches.is_closed
    batches.is_closed = False
    with pytest.raises(ZeroDivisionError):
        take(batches, 3, lambda batch: 1 / 0)
    assert batches.is_closed
