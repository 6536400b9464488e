"""Pictures: every level comes out as it went in, and every image of a grid in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launchers.sampling.pictures import save_grid, tile, to_uint8


def test_images_become_levels_rounded_to_the_nearest() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, -2.0, 2.0, 127.4 / 127.5 - 1, 127.6 / 127.5 - 1])
    levels = to_uint8(values.view(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert levels.dtype == np.uint8 and levels.shape == (1, 1, 7, 3)
    assert levels[0, 0, :, 0].tolist() == [0, 128, 255, 0, 255, 127, 128]  # 0 lies between 127 and 128: to the even


def test_all_256_levels_survive_the_round_trip() -> None:
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = levels / 127.5 - 1
    assert np.array_equal(to_uint8(images), levels.permute(0, 2, 3, 1).numpy())


def test_channels_come_last_and_keep_their_order() -> None:
    image = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    assert to_uint8(image)[0, 0, 0].tolist() == [255, 0, 128]


def flat(number: int, side: int) -> np.ndarray:
    """Image i has the level i everywhere."""
    return np.broadcast_to(np.arange(number, dtype=np.uint8)[:, None, None, None], (number, side, side, 3))


def test_a_grid_is_filled_row_by_row_with_gaps_between(tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    save_grid(flat(5, 48), path, columns=3, gap=2)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 50 + 2, 3 * 50 + 2, 3)
    for i in range(5):
        top, left = 2 + i // 3 * 50, 2 + i % 3 * 50
        assert (sheet[top : top + 48, left : left + 48] == i).all()
    assert (sheet[:2] == 255).all() and (sheet[:, 50:52] == 255).all() and (sheet[52:, 102:] == 255).all()


def test_a_tiled_picture_keeps_every_pixel() -> None:
    sheet = tile(flat(4, 3), columns=2, gap=1)
    assert sheet.shape == (9, 9, 3)
    assert sheet[1:4, 1:4].max() == 0 and (sheet[5:8, 5:8] == 3).all() and (sheet[4] == 255).all()


@pytest.mark.parametrize("side, factor", [(16, 3), (20, 3), (48, 1), (256, 1)])
def test_small_images_are_enlarged_without_smoothing(tmp_path: Path, side: int, factor: int) -> None:
    save_grid(flat(2, side), tmp_path / "grid.png", columns=2, least_side=48, gap=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[:2] == ((side + 2) * factor, (2 * side + 3) * factor)
    assert set(np.unique(sheet)) == {0, 1, 255}
