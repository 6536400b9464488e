"""Figures: no text is cut off, no pixel is lost, and a file is whole or absent."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from launchers.figures import plots as figures
from launchers.figures.plots import AttentionMap, Cell, draw_attention, draw_table


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, with their canvases."""
    seen: list[Figure] = []
    save = figures._save

    def remember(figure: Figure, path: Path, *, dpi: float) -> None:
        save(figure, path, dpi=dpi)
        seen.append(figure)

    monkeypatch.setattr(figures, "_save", remember)
    return seen


def picture(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def attention(num_tokens: int, *, sharpness: float = 1.0) -> np.ndarray:
    scores = np.exp(sharpness * np.random.default_rng(0).normal(size=(num_tokens, num_tokens)))
    return scores / scores.sum(axis=1, keepdims=True)


def assert_text_is_inside(figure: Figure) -> None:
    """Nothing that is visible sticks out of the figure."""
    FigureCanvasAgg(figure).draw()
    tight, size = figure.get_tightbbox(), figure.get_size_inches()
    assert tight.x0 >= 0 and tight.y0 >= 0 and tight.x1 <= size[0] and tight.y1 <= size[1]


def cells(rows: int, columns: int, side: int) -> list[list[Cell]]:
    pictures = [picture(side, seed) for seed in range(rows * columns)]
    table = [Cell(picture, "100.0% · step 333,638") for picture in pictures]
    return [table[first : first + columns] for first in range(0, len(table), columns)]


@pytest.mark.parametrize("rows, columns", [(1, 1), (4, 3)])
def test_the_labels_of_a_table_fit(tmp_path: Path, drawn: list[Figure], rows: int, columns: int) -> None:
    names = ["d30, 2,010.0M parameters"] * rows, ["100% of training tokens"] * columns
    draw_table(tmp_path / "t.png", cells(rows, columns, 20), rows=names[0], columns=names[1])
    assert_text_is_inside(drawn[0])
    shown = [axes.images[0].get_array() for axes in drawn[0].axes]
    assert np.array_equal(shown[-1], picture(20, rows * columns - 1)) and len(shown) == rows * columns


def test_a_table_has_at_least_as_many_pixels_as_its_pictures(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_table(tmp_path / "t.png", cells(2, 2, 700), rows=["a", "b"], columns=["c", "d"])
    width, height = Image.open(tmp_path / "t.png").size
    assert width > 2 * 700 and height > 2 * 700
    share = drawn[0].axes[0].get_position().width
    assert share * width >= 700


@pytest.mark.parametrize("number, num_tokens", [(1, 16), (3, 16), (2, 400)])
def test_the_labels_of_attention_maps_fit(tmp_path: Path, drawn: list[Figure], number: int, num_tokens: int) -> None:
    maps = [AttentionMap(picture(32), attention(num_tokens), "bidirectionality 1.00")] * number
    draw_attention(tmp_path / "a.png", maps, title="Token dependency · mean bidirectionality 1.00")
    assert_text_is_inside(drawn[0])
    width = Image.open(tmp_path / "a.png").size[0]
    assert drawn[0].axes[1].get_position().width * width >= min(num_tokens, 400)


@pytest.mark.parametrize("weights", [np.full((4, 4), 0.25), np.eye(4), np.ones((1, 1)), attention(64, sharpness=20)])
def test_attention_of_any_kind_can_be_drawn(tmp_path: Path, drawn: list[Figure], weights: np.ndarray) -> None:
    draw_attention(tmp_path / "a.png", [AttentionMap(picture(8), weights, "n")], title="t")
    norm = drawn[0].axes[1].images[0].norm
    assert 0 < norm.vmin < 1 < norm.vmax  # uniform attention has a colour in every figure
    assert np.isfinite(drawn[0].axes[1].images[0].get_array()).all()


def test_a_figure_that_cannot_be_drawn_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Figure, file: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        draw_table(tmp_path / "t.png", cells(1, 1, 8), rows=["a"], columns=["b"])
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_pyplot_is_not_touched(tmp_path: Path) -> None:
    draw_table(tmp_path / "t.png", cells(1, 1, 8), rows=["a"], columns=["b"])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
