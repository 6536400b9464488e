"""Figs. 5 and 6: what is drawn is what was measured and fitted, no text is cut off, and a law may be missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from study_examples import planted_fit, planted_runs

from launchers.figures import scaling as scaling_figures
from launchers.figures.scaling import draw_compute_laws, draw_size_laws, equation
from training.laws.study_data import METRICS
from training.laws.study_fit import COMPUTE, PowerLaw, StudyFit

RUNS = planted_runs((6, 8, 10, 12), noise=1e-3)
FIT = planted_fit(RUNS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been saved."""
    seen: list[Figure] = []
    monkeypatch.setattr(scaling_figures, "_save", lambda figure, path: seen.append(figure))
    return seen


def only(metric: str) -> StudyFit:
    return replace(FIT, laws=tuple(law for law in FIT.laws if law.metric == metric))


def heights(axes: Axes, marker: str) -> list[float]:
    return [float(value) for line in axes.lines if line.get_marker() == marker for value in line.get_ydata()]


def assert_text_is_inside(figure: Figure) -> None:
    """Nothing that is visible sticks out of the figure."""
    tight, size = figure.get_tightbbox(), figure.get_size_inches()
    assert tight.x0 >= 0 and tight.y0 >= 0 and tight.x1 <= size[0] and tight.y1 <= size[1]


def test_sizes_are_drawn_above_the_irreducible_part_with_their_residuals(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_size_laws(tmp_path / "5.png", RUNS, only("loss_last"))
    (figure,), law = drawn, only("loss_last").laws[0]
    main, strip = figure.axes
    assert heights(main, "o") == pytest.approx([y - law.law.irreducible for y in law.y])
    assert heights(strip, "o") == pytest.approx(100 * np.expm1(law.residuals))
    assert heights(main, "x") == pytest.approx([law.held_out[0].predicted - law.law.irreducible])
    assert len(heights(main, "_")) == 3  # the seeds of the smallest
    faces = [line.get_markerfacecolor() for line in main.lines if line.get_marker() == "o"]
    assert [face == "white" for face in faces] == [False, False, False, True]
    assert main.get_xscale() == main.get_yscale() == "log"
    assert equation(law) in [text.get_text() for text in main.get_legend().get_texts()]


def test_the_band_holds_the_laws_that_were_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_size_laws(tmp_path / "5.png", RUNS, only("error_avg"))
    law = only("error_avg").laws[0]
    (outline,) = drawn[0].axes[0].collections[0].get_paths()
    x = float(outline.vertices[0, 0])
    edge = outline.vertices[outline.vertices[:, 0] == x, 1]
    laws = [float(PowerLaw(*draw)(x)) for draw in law.draws]
    assert [edge.min(), edge.max()] == pytest.approx(np.quantile(laws, (0.025, 0.975)))


def test_every_metric_has_its_curves_and_only_those_with_a_law_a_frontier(tmp_path: Path, drawn: list[Figure]) -> None:
    without = [law for law in FIT.laws if (law.metric, law.variable) != ("loss_avg", COMPUTE)]
    draw_compute_laws(tmp_path / "6.png", RUNS, replace(FIT, laws=tuple(without)))
    (figure,) = drawn
    mains = figure.axes[::2]
    assert len(mains) == len(METRICS)
    for axes in mains:
        curves = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(curves) == len(RUNS)
        assert np.array_equal(curves[0].get_xdata(), RUNS[0].compute("exact"))
    assert [axes.get_legend() is None for axes in mains] == [False, True, False, False]
    assert np.array_equal(mains[1].lines[0].get_ydata(), RUNS[0].metrics["loss_avg"])


def test_a_figure_is_a_png_and_no_text_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve sizes and four metrics are the most that a figure has to hold."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, file: object, **options: object) -> None:
        figures.append(figure)
        save(figure, file, **options | {"dpi": 40})

    monkeypatch.setattr(Figure, "savefig", savefig)
    runs = planted_runs(noise=1e-3)
    for draw in (draw_size_laws, draw_compute_laws):
        draw(tmp_path / "figure.png", runs, planted_fit(runs))
        with Image.open(tmp_path / "figure.png") as picture:
            assert picture.format == "PNG" and picture.width == 40 * figures[-1].get_figwidth()
        assert_text_is_inside(figures[-1])


def test_without_a_law_in_parameters_there_is_no_figure_5(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no law in parameters was found"):
        draw_size_laws(tmp_path / "5.png", RUNS, replace(FIT, laws=()))
    assert not (tmp_path / "5.png").exists()
