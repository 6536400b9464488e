"""Tables of pictures and attention maps, drawn with matplotlib; what is drawn is computed elsewhere.

Figures are objects; pyplot and its global state are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.atomic import atomic_file

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

LEAST_DPI, GREATEST_DPI = 160, 400
CELL_INCHES = 2.6
MAP_INCHES = 2.9
PAIRS_PER_ROW = 2
GREY = "#555555"
COLOUR_MAP = "magma"
LEAST_SCORE = 1e-3  # of uniform attention; what is fainter is drawn as this
ROUND_NUMBERS = [step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5)]


@dataclass(frozen=True)
class Cell:
    """A picture (H, W, 3) uint8 in a table, and the line below it."""

    picture: np.ndarray
    note: str


@dataclass(frozen=True)
class AttentionMap:
    """A photograph (H, W, 3) uint8, its attention (n, n), row i that of token i, and the line below."""

    photograph: np.ndarray
    weights: np.ndarray
    note: str


def draw_table(path: Path, cells: Sequence[Sequence[Cell]], *, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Write a table of pictures with named rows and columns, each picture with all of its pixels."""
    height, width, _ = cells[0][0].picture.shape
    figure = _new_figure(CELL_INCHES * len(columns) + 0.6, CELL_INCHES * len(rows) + 0.5)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, name in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=11, labelpad=8)
        for column, cell in enumerate(cells[row]):
            _show(axes[row, column], cell.picture)
            axes[row, column].set_xlabel(cell.note, fontsize=8, color=GREY)
    for column, name in enumerate(columns):
        axes[0, column].set_title(name, fontsize=11, pad=8)
    _save(figure, path, dpi=max(height, width) / (CELL_INCHES - 0.4))


def draw_attention(path: Path, maps: Sequence[AttentionMap], *, title: str) -> None:
    """Write photographs beside their attention maps, in multiples of uniform attention and on one scale of colours."""
    per_row = min(PAIRS_PER_ROW, len(maps))
    num_rows = -(-len(maps) // per_row)
    figure = _new_figure(per_row * (2 * MAP_INCHES + 1.0) + 1.0, num_rows * (MAP_INCHES + 0.8) + 0.4)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(num_rows, 2 * per_row, squeeze=False)
    pairs = axes.reshape(-1, 2)
    low, high = _common_scale(maps)
    for (left, right), attention in zip(pairs, maps):
        _show(left, attention.photograph)
        left.set_xlabel(attention.note, fontsize=10, labelpad=8)
        shown = _show_map(right, attention.weights, LogNorm(low, high))
    for unused in pairs[len(maps) :].ravel():
        unused.set_axis_off()
    bar = figure.colorbar(shown, ax=axes, aspect=25 * num_rows, pad=0.02, extend="both")
    bar.set_label("attention score, 1 = uniform", fontsize=10)
    bar.set_ticks([tick for tick in ROUND_NUMBERS if low <= tick <= high], minor=False)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    _save(figure, path, dpi=max(len(attention.weights) for attention in maps) / MAP_INCHES)


def _common_scale(maps: Sequence[AttentionMap]) -> tuple[float, float]:
    """Choose the ends of a scale that leaves out the few extremes and includes uniform attention, 1."""
    scores = np.concatenate([attention.weights.ravel() * len(attention.weights) for attention in maps])
    faint, strong = np.quantile(scores, (0.01, 0.999))
    return min(max(faint, LEAST_SCORE), 0.5), max(strong, 2.0)


def _show_map(axes: Axes, weights: np.ndarray, norm: LogNorm) -> AxesImage:
    """Show attention (n, n) in multiples of uniform attention, logarithmically, since it is peaked."""
    num_tokens = len(weights)
    shown = axes.imshow(np.maximum(weights * num_tokens, LEAST_SCORE), cmap=COLOUR_MAP, norm=norm)
    ticks = sorted({num_tokens * quarter // 4 for quarter in range(4)} | {num_tokens - 1})
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.tick_params(labelsize=8, length=2, colors=GREY)
    axes.set_xlabel("attends to token", fontsize=10)
    axes.set_ylabel("token, in raster order", fontsize=10)
    return shown


def _new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches, that makes room for its own labels."""
    return Figure((width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.02, hspace=0.02))


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path, *, dpi: float) -> None:
    """Write the figure whole or not at all, with `dpi` dots an inch or what of it is sensible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=min(max(dpi, LEAST_DPI), GREATEST_DPI), facecolor="white")
