"""Figs. 5 and 6 of the paper, drawn from the fits of a study: the laws, their residuals, the curves and their frontier.

Everything that is drawn is computed elsewhere except the bands, which hold 95 % of the bootstrapped laws at every x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file
from launchers.figures.plots import GREY
from training.accounting import BILLION, LABELS
from training.laws.study_data import METRICS, TrainedSize
from training.laws.study_fit import COMPUTE, EQ8, PARAMETERS, TOTAL, LawFit, StudyFit

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, MaxNLocator, NullLocator

DPI = 200
RED, BAND_RED, FRONTIER = "#c4302b", "#e9a3a0", "#1a1a1a"
BAND = (0.025, 0.975)  # quantiles of the bootstrap
CROWDED = 8  # sizes; of more only every second is named
DASHED = (0, (5, 2.5))
SIZES = colormaps["viridis"]
SYMBOLS = {
    "loss_last": r"L_{\mathrm{last}}",
    "loss_avg": r"L_{\mathrm{avg}}",
    "error_last": r"Err_{\mathrm{last}}",
    "error_avg": r"Err_{\mathrm{avg}}",
}
TITLES = {
    "loss_last": "Validation loss, last scale",
    "loss_avg": "Validation loss, average",
    "error_last": "Token error rate, last scale",
    "error_avg": "Token error rate, average",
}
LETTERS = {PARAMETERS: "N", COMPUTE: r"C_{\min}"}
COUNTED = {TOTAL: "all", EQ8: "those of eq. 8"}
KEY_INCHES = 2.1  # of the legend below, for one key
LEGEND_SHARE = 0.14  # of a panel's height that is kept free below the curves for the equation
LOG_TICKS_FROM = 30.0  # ratio of an axis's ends above which its ticks are powers of ten

Colours = dict[str, tuple[float, float, float, float]]  # by the name of the size


@dataclass(frozen=True)
class Panel:
    """The axes of a metric, with the strip of residuals below it."""

    metric: str
    law: LawFit | None  # where one was found
    main: Axes
    strip: Axes

    @property
    def irreducible(self) -> float:
        """The part of the metric that is subtracted before it is drawn."""
        return self.law.law.irreducible if self.law else 0.0


def draw_size_laws(path: Path, runs: Sequence[TrainedSize], fit: StudyFit) -> None:
    """Draw Fig. 5: the metrics at the end of training against model size, log-log, above their irreducible parts.

    Held-out sizes are hollow, beside what the laws without them predict. `runs` are the study's, with all seeds. Raises
    ValueError if no law was found.
    """
    laws = {law.metric: law for law in fit.laws if law.variable == PARAMETERS}
    if not laws:
        raise ValueError("no law in parameters was found, so there is none to draw")
    figure, panels = _panels({metric: laws[metric] for metric in METRICS if metric in laws})
    colours = _colours(runs)
    for panel in panels:
        _draw_law(panel, laws[panel.metric], margin=1.15)
        _draw_sizes(panel, laws[panel.metric], runs, colours)
        _draw_other_seeds(panel, runs, fit.counted_parameters)
        _draw_predictions(panel, laws[panel.metric])
        _finish(panel, f"parameters N, {COUNTED[fit.counted_parameters]} (billions)")
    _legend(figure, _size_keys(list(laws.values())))
    _save(figure, path)


def draw_compute_laws(path: Path, runs: Sequence[TrainedSize], fit: StudyFit) -> None:
    """Draw Fig. 6: the metrics during training against compute, one line a size, their frontier and its law.

    A metric without a law is drawn as it is.
    """
    laws = {law.metric: law for law in fit.laws if law.variable == COMPUTE}
    figure, panels = _panels({metric: laws.get(metric) for metric in METRICS})
    colours = _colours(runs)
    for panel in panels:
        _draw_curves(panel, runs, fit.accounting, colours)
        if panel.law:
            _draw_frontier(panel, panel.law)
            _draw_law(panel, panel.law, margin=2.0)
            low, high = np.log(panel.main.get_ylim())
            panel.main.set_ylim(bottom=np.exp(low - LEGEND_SHARE * (high - low)))
        _finish(panel, f"compute C, PFLOP ({LABELS[fit.accounting]})")
    _legend(figure, [*(_frontier_keys() if laws else []), *_line_keys(runs, colours)])
    _save(figure, path)


def _panels(laws: Mapping[str, LawFit | None]) -> tuple[Figure, list[Panel]]:
    """Make a panel a metric, two a row, each above its own strip of residuals."""
    rows, columns = -(-len(laws) // 2), min(2, len(laws))
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.02)
    figure = Figure((5.4 * columns, 4.9 * rows + 0.5), layout=layout)
    panels = []
    for (metric, law), part in zip(laws.items(), figure.subfigures(rows, columns, squeeze=False).ravel()):
        main, strip = part.subplots(2, 1, sharex=True, height_ratios=(4.2, 1))
        main.set(xscale="log", yscale="log")
        panels.append(Panel(metric, law, main, strip))
    return figure, panels


def _draw_sizes(panel: Panel, law: LawFit, runs: Sequence[TrainedSize], colours: Colours) -> None:
    """Draw the points of the law and their residuals, and name every size, or every second one of many."""
    held_out = [point.name for point in law.held_out]
    named = law.names[:: -1 - (len(law.names) > CROWDED)]
    for name, x, y, residual in zip(law.names, law.x, law.y, law.residuals, strict=True):
        look: dict[str, Any] = {
            "marker": "o",
            "markersize": 6.5,
            "color": colours[name],
            "markeredgewidth": 1.4,
            "zorder": 5,
        }
        look["markerfacecolor"] = "white" if name in held_out else colours[name]
        panel.main.plot(x, y - panel.irreducible, **look)
        panel.strip.plot(x, 100 * np.expm1(residual), **look)
        if name in named:
            panel.main.annotate(
                name, (x, y - panel.irreducible), fontsize=7.5, color=GREY, xytext=(4, 6), textcoords="offset points"
            )


def _draw_curves(panel: Panel, runs: Sequence[TrainedSize], accounting: str, colours: Colours) -> None:
    first_seed = min(run.seed for run in runs)
    for run in sorted(runs, key=lambda run: run.num_parameters):
        heights = run.metrics[panel.metric] - panel.irreducible
        is_seen = np.isfinite(heights) & (heights > 0)
        x, y = run.compute(accounting)[is_seen], heights[is_seen]
        width = 1.3 if run.seed == first_seed else 0.6
        panel.main.plot(x, y, color=colours[run.size], linewidth=width, marker="o", markersize=2.2, zorder=2)


def _draw_frontier(panel: Panel, law: LawFit) -> None:
    order = np.argsort(law.x)
    x, y = np.asarray(law.x)[order], np.asarray(law.y)[order]
    panel.main.plot(x, y - panel.irreducible, color=FRONTIER, linewidth=3.0, alpha=0.85, zorder=3)
    panel.strip.plot(x, 100 * np.expm1(np.asarray(law.residuals)[order]), color=FRONTIER, linewidth=1.4)


def _draw_law(panel: Panel, fit: LawFit, *, margin: float) -> None:
    """The law dashed with its band, and its equation in the legend, so many times beyond its points."""
    law = fit.law
    x = np.geomspace(min(fit.x) / margin, max(fit.x) * margin, 200)
    if fit.draws:
        exponents, scales, irreducibles = np.array(fit.draws).T[:, :, None]  # (3, draws, 1)
        with np.errstate(over="ignore"):
            drawn = irreducibles + (scales * x) ** exponents - law.irreducible  # (draws, 200)
        lowest, highest = np.quantile(drawn, BAND, axis=0)
        floor = law.reducible(x).min() / 100  # a band may reach below 0, which has no place on these axes
        lowest = np.maximum(lowest, floor)
        panel.main.fill_between(x, lowest, highest, color=BAND_RED, alpha=0.45, linewidth=0, zorder=1)
    panel.main.plot(x, law.reducible(x), color=RED, linestyle=DASHED, linewidth=1.6, zorder=4, label=equation(fit))
    panel.strip.axhline(0, color=RED, linestyle=DASHED, linewidth=1.0, zorder=1)


def equation(fit: LawFit) -> str:
    """Write a law as a formula, with its 95 % interval and Pearson's r."""
    law, interval = fit.law, fit.exponent_interval
    constant = f"{law.irreducible:.5g} + " if law.irreducible else ""
    return (
        f"${SYMBOLS[fit.metric]} = {constant}({_number(law.scale)}\\,{LETTERS[fit.variable]})^{{{law.exponent:.5g}}}$\n"
        f"exponent in [{interval.low:.4g}, {interval.high:.4g}], r = {fit.pearson:.5f}"
    )


def _number(value: float) -> str:
    """Write five digits for a formula."""
    digits, _, power = f"{value:.4e}".partition("e")
    return f"{value:.5g}" if -2 <= int(power) <= 3 else f"{digits}\\cdot 10^{{{int(power)}}}"


def _draw_other_seeds(panel: Panel, runs: Sequence[TrainedSize], counted: str) -> None:
    """Draw each seed of a size that was repeated, as a dash."""
    names = [run.size for run in runs]
    several = [run for run, name in zip(runs, names, strict=True) if names.count(name) > 1 and run.is_finished]
    x = [run.counted(counted) / BILLION for run in several]
    y = [run.final(panel.metric) - panel.irreducible for run in several]
    panel.main.plot(x, y, "_", color=FRONTIER, markersize=11, markeredgewidth=0.9, zorder=6)


def _draw_predictions(panel: Panel, law: LawFit) -> None:
    for point in law.held_out:
        middle = point.predicted - panel.irreducible
        low, high = max(point.interval.low - panel.irreducible, middle / 100), point.interval.high - panel.irreducible
        panel.main.plot([point.x, point.x], [low, high], color=FRONTIER, linewidth=1.0, zorder=3)
        panel.main.plot(point.x, middle, marker="x", color=FRONTIER, markersize=6, markeredgewidth=1.3, zorder=7)


def _finish(panel: Panel, label: str) -> None:
    main, strip = panel.main, panel.strip
    main.set_title(TITLES[panel.metric], fontsize=11, loc="left")
    unit = " (nats)" if panel.metric.startswith("loss") else ""
    main.set_ylabel(f"${SYMBOLS[panel.metric]}{' - E' if panel.irreducible else ''}${unit}", fontsize=10)
    strip.set_ylabel("residual (%)", fontsize=8.5)
    strip.set_xlabel(label, fontsize=10)
    for axis in (main.xaxis, main.yaxis):
        _set_ticks(axis)
    for axes in (main, strip):
        axes.grid(which="major", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5, colors="#333333")
    main.tick_params(labelbottom=False)
    if panel.law is None:
        strip.set_yticks([])
        strip.text(0.5, 0.5, "no law", transform=strip.transAxes, ha="center", va="center", fontsize=8.5, color=GREY)
        return
    farthest = 1.25 * max(np.abs(100 * np.expm1(panel.law.residuals)).max(), 1e-9)
    strip.set_ylim(-farthest, farthest)
    strip.yaxis.set_major_locator(MaxNLocator(3, symmetric=True))
    main.legend(loc="lower left", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.6)


def _set_ticks(axis: Axis) -> None:
    """Set powers of ten on long axes and round numbers on short ones: an error rate changes by some per cent in all."""
    low, high = axis.get_view_interval()
    if high / low > LOG_TICKS_FROM:
        axis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(LogFormatterMathtext() if high / low > 1e3 else FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.6g}"))
    axis.set_minor_locator(NullLocator())


def _colours(runs: Sequence[TrainedSize]) -> Colours:
    """Return a colour for each size, by its rank."""
    sizes = _sizes(runs)
    return {name: SIZES(0.88 * rank / max(len(sizes) - 1, 1)) for rank, name in enumerate(sizes)}


def _sizes(runs: Sequence[TrainedSize]) -> dict[str, int]:
    """Return the parameters of each size, smallest first."""
    return {run.size: run.num_parameters for run in sorted(runs, key=lambda run: run.num_parameters)}


def _size_keys(laws: Sequence[LawFit]) -> list[Line2D]:
    keys = [
        Line2D([], [], color=GREY, marker="o", linestyle="", markersize=6.5, label="a size, at the end of training"),
        Line2D([], [], color=RED, linestyle=DASHED, label="law"),
        Line2D([], [], color=BAND_RED, linewidth=7, alpha=0.6, label="95 % of bootstrapped laws"),
    ]
    if any(law.held_out for law in laws):
        hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "white", "linestyle": "", "markersize": 6.5}
        keys.append(Line2D([], [], color=GREY, label="held out for the gate", **hollow))
        keys.append(Line2D([], [], color=FRONTIER, marker="x", label="prediction without it, 95 %"))
    return keys


def _frontier_keys() -> list[Line2D]:
    return [
        Line2D([], [], color=FRONTIER, linewidth=3.2, label="frontier, interior sizes"),
        Line2D([], [], color=RED, linestyle=DASHED, label="its law"),
        Line2D([], [], color=BAND_RED, linewidth=7, alpha=0.6, label="95 % of bootstrapped laws"),
    ]


def _line_keys(runs: Sequence[TrainedSize], colours: Colours) -> list[Line2D]:
    return [
        Line2D([], [], color=colours[name], linewidth=2, label=f"{name}, {count / 1e6:,.1f}M")
        for name, count in _sizes(runs).items()
    ]


def _legend(figure: Figure, keys: list[Line2D]) -> None:
    columns = int(figure.get_figwidth() / KEY_INCHES)
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    """Write the figure whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DPI, facecolor="white")
