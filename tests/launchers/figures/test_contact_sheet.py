"""The contact sheet shows pictures of every class as they come out of the shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import PACK_OPTIONS

from data_pipeline.making.packing import pack_images
from launchers.figures.contact_sheet import COLUMNS, GAP, LINE, ROWS, SIDE, choose, write_contact_sheet

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def pack_colours(folder: Path, size: tuple[int, int] = (8, 8), number: int = 3, **options) -> Path:
    for name, colour in COLOURS.items():
        (folder / "source" / name).mkdir(parents=True)
        for copy in range(number):
            Image.new("RGB", size, colour).save(folder / "source" / name / f"{copy}.png", **options)
    pack_images(str(folder / "source"), folder / "out", **{**PACK_OPTIONS, "val_fraction": 0.34})
    return folder / "out"


def cells(path: Path, count: int) -> list[np.ndarray]:
    """The places of the pictures on the sheet, row by row: (SIDE, SIDE, 3) each."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    places = [divmod(cell, COLUMNS) for cell in range(count)]
    corners = [(GAP + row * (SIDE + 2 * LINE + GAP), GAP + column * (SIDE + GAP)) for row, column in places]
    return [pixels[top : top + SIDE, left : left + SIDE] for top, left in corners]


def test_every_picture_has_its_colours_and_classes_come_in_order(tmp_path: Path) -> None:
    path = write_contact_sheet(pack_colours(tmp_path), seed=0)
    middles = [tuple(cell[SIDE // 2, SIDE // 2]) for cell in cells(path, 6)]
    assert middles == [colour for colour in COLOURS.values() for _ in range(2)]


def test_pictures_are_upright_and_keep_their_proportions(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    path = write_contact_sheet(pack_colours(tmp_path, size=(400, 100), exif=exif), seed=0)
    shown = np.all(cells(path, 1)[0] == COLOURS["blue"], axis=2)
    assert (np.count_nonzero(shown.any(axis=1)), np.count_nonzero(shown.any(axis=0))) == (SIDE, SIDE // 4)


def test_the_same_sheet_every_time_and_another_for_another_seed(tmp_path: Path) -> None:
    packed = pack_colours(tmp_path)
    first, again = (write_contact_sheet(packed, seed=0).read_bytes() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("sizes", [(30, 30, 30), (1000, 3, 3), (5, 1)])
def test_classes_are_shown_equally_often_as_far_as_they_go(sizes: tuple[int, ...]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    chosen = choose(labels, 12, seed=0)
    shown = Counter(labels[chosen].tolist())
    assert len(set(chosen)) == len(chosen) == min(12, sum(sizes))
    assert all(shown[label] == size or shown[label] >= 12 // len(sizes) for label, size in enumerate(sizes))
    assert choose(labels, 12, seed=1) != chosen or len(labels) <= 12


def test_of_more_classes_than_there_is_room_for_each_is_shown_once() -> None:
    labels = np.arange(1000) % 500
    chosen = choose(labels, COLUMNS * ROWS, seed=0)
    assert len(set(labels[chosen].tolist())) == COLUMNS * ROWS == len(chosen)


@pytest.mark.parametrize("name", ["a b 'c' \"d\"", "línea\nnueva", "猫", "x" * 200])
def test_odd_names_are_written_as_far_as_they_go(tmp_path: Path, name: str) -> None:
    (tmp_path / "source" / name).mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (1, 300)).save(tmp_path / "source" / name / f"{number} {name[:100]}.png")
    pack_images(str(tmp_path / "source"), tmp_path / "out", **{**PACK_OPTIONS, "val_fraction": 0.5})
    with Image.open(write_contact_sheet(tmp_path / "out", seed=0)) as sheet:
        assert sheet.size == (SIDE + 2 * GAP, SIDE + 2 * LINE + 2 * GAP)
