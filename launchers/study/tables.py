"""The tables of a study's report, in Markdown. Numbers have six significant digits, so that others can use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from launchers.study.reading import MeasuredRun, Study
from training.flops import ACCOUNTINGS
from training.laws.study_data import LOSSES, METRICS
from training.laws.study_fit import Interval, LawFit, StudyFit

ACCOUNTED = {
    "exact": "exact",
    "dense_mask": "dense mask",
    "six_nt": "6NT",
    "paper": "the paper's (forward MACs)",
}


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get six digits, the first column is text, the others are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *([text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(value: Any) -> str:
    """A value in a table: six significant digits, thousands apart."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.6g}"
    if isinstance(value, Interval):
        return f"{value.low:.6g} to {value.high:.6g}"
    return "–" if value is None else str(value)


def runs_table(study: Study) -> str:
    """Every run with its two counts of parameters and its recipe."""
    header = ["run", "parameters", "eq. 8", "width", "batch", "peak rate", "epochs", "images", "points", "finished"]
    return table(header, [_run_row(run) for run in study.runs])


def _run_row(run: MeasuredRun) -> list[Any]:
    size, batch = run.size, run.config.loop.global_batch
    about = [size.name, size.num_parameters, size.eq8_parameters, run.config.model.width]
    recipe = [batch, run.config.optimizer.peak_lr(batch), round(run.epochs, 3)]
    return [*about, *recipe, int(size.images[-1]), len(size.images), size.is_finished]


def metrics_table(study: Study) -> str:
    """The last evaluation of every run."""
    return table(["run", *METRICS], [[size.name, *map(size.final, METRICS)] for size in study.sizes])


def compute_table(study: Study) -> str:
    """PFLOP to the last evaluation of each run, by four accountings, and what each is beside the exact one."""
    header = ["run", "GFLOP an image, exact", *(f"PFLOP, {ACCOUNTED[name]}" for name in ACCOUNTINGS)]
    header += [f"{ACCOUNTED[name]} / exact" for name in ACCOUNTINGS[1:]]
    rows = []
    for size in study.sizes:
        flops = size.flops_per_image
        totals = [float(size.compute(name)[-1]) for name in ACCOUNTINGS]
        rows.append([size.name, flops["exact"] / 1e9, *totals, *(total / totals[0] for total in totals[1:])])
    return table(header, rows)


def laws_of(fit: StudyFit, variable: str) -> list[LawFit]:
    return [law for law in fit.laws if law.variable == variable]


def laws_table(laws: Sequence[LawFit]) -> str:
    """The laws with their intervals."""
    header = ["metric", "E", "E from", "E, 95 %", "beta", "beta, 95 %", "exponent", "95 %, bootstrap", "95 %, Student"]
    rows = [
        [
            *(law.metric, law.law.irreducible, law.source_of_irreducible, law.irreducible_interval),
            *(law.law.scale, law.scale_interval),
            *(law.law.exponent, law.exponent_interval, law.exponent_t_interval),
        ]
        for law in laws
    ]
    return table(header, rows)


def trust_table(laws: Sequence[LawFit]) -> str:
    """How well each law describes its own points: none of this says that it holds beyond them."""
    header = ["metric", "points", "left out", "r", "R²", "runs test, p", "largest residual"]
    rows = [
        [
            *(law.metric, len(law.x), len(law.left_out), law.pearson, law.r_squared, law.runs_test),
            f"{max(abs(math.expm1(residual)) for residual in law.residuals):.4%}" if law.residuals else None,
        ]
        for law in laws
    ]
    return table(header, rows)


def left_out_lines(laws: Sequence[LawFit]) -> list[str]:
    """Which points were not used, and why; what holds for several sizes or metrics is said once."""
    metrics: dict[str, list[str]] = {}
    for law in laws:
        for reason in law.left_out:
            metrics.setdefault(reason, []).append(law.metric)
    names: dict[tuple[str, str], list[str]] = {}
    for reason, several in metrics.items():
        name, colon, what = reason.partition(": ")
        where = "all metrics" if set(several) == {law.metric for law in laws} else ", ".join(several)
        names.setdefault((what if colon else reason, where), []).append(name if colon else "")
    return [f"{', '.join(filter(None, n))}{': ' if n[0] else ''}{what} ({where})" for (what, where), n in names.items()]


def held_out_table(laws: Sequence[LawFit]) -> str | None:
    """What the laws of the smaller sizes say of the largest; None where none was held out."""
    header = ["metric", "held out", "measured", "predicted", "95 %", "error", "of the reducible part"]
    header += ["of the predicted fall", "gate"]
    rows = [
        [
            *(law.metric, point.name, point.measured, point.predicted, point.interval, f"{point.nats:+.6f}"),
            *(f"{point.share:.3%}", f"{point.share_of_gain:.1%}", "passed" if point.passed else "**failed**"),
        ]
        for law in laws
        for point in law.held_out
    ]
    return table(header, rows) if rows else None


def sensitivity_table(laws: Sequence[LawFit]) -> str | None:
    """How the exponent moves with the E that is assumed; None where no other E tells a law."""
    header = ["metric", "E assumed", "exponent", "r", "worst error of the held-out sizes"]
    rows = [
        [law.metric, row.irreducible, row.exponent, row.pearson, row.held_out_nats]
        for law in laws
        for row in law.sensitivity
    ]
    return table(header, rows) if rows else None


def frontier_table(fit: StudyFit) -> str | None:
    """The frontier's exponent by each estimator; None where none found one."""
    rows = [
        [metric, each.estimator, each.law.irreducible, each.law.scale, each.law.exponent, each.interval]
        for metric, several in fit.frontiers
        for each in several
    ]
    return table(["metric", "estimator", "E", "beta", "exponent", "95 %"], rows) if rows else None


def parametric_table(fit: StudyFit) -> str | None:
    """L(N, D) of the losses; None where there were too few points."""
    header = ["metric", "E", "A", "a", "B", "b", "ab / (a + b)", "points", "R²"]
    rows = [
        [
            *(law.metric, law.irreducible, law.parameter_factor, law.parameter_exponent),
            *(law.token_factor, law.token_exponent, law.compute_exponent, law.num_points, law.r_squared),
        ]
        for law in fit.parametric
    ]
    return table(header, rows) if rows else None


def seeds_table(fit: StudyFit) -> str | None:
    """How much seeds differ; None where no size was repeated."""
    rows = [
        [noise.size, noise.metric, len(noise.values), min(noise.values), max(noise.values)]
        + [f"{noise.relative_deviation:.4%}"]
        for noise in fit.seeds
    ]
    return table(["size", "metric", "seeds", "lowest", "highest", "standard deviation / mean"], rows) if rows else None


def gap_table(study: Study) -> str | None:
    """Validation minus training at the end of each run; None where no record allows it."""
    header = ["run", "epochs", *(f"{metric}, {what}" for metric in LOSSES for what in ("training", "gap"))]
    rows = [[run.size.name, round(run.epochs, 3), *_gaps(run)] for run in study.runs if run.training]
    return table(header, rows) if rows else None


def _gaps(run: MeasuredRun) -> list[float]:
    ends = [(run.training[metric], run.size.final(metric)) for metric in LOSSES]
    return [value for training, validation in ends for value in (training, validation - training)]


def entropy_table(study: Study) -> str | None:
    """The lowest loss of each run beside the source's entropy; None where that is not known."""
    source = study.source
    header = ["metric", "entropy", "the source's own loss", "run", "lowest loss", "- entropy", "- own loss"]
    rows: list[list[Any]] = []
    for metric, entropy in source.entropy.items():
        own = source.own_loss.get(metric)
        for size in study.sizes:
            lowest = float(np.nanmin(size.metrics[metric]))
            above_own = None if own is None else lowest - own
            rows.append([metric, entropy, own, size.name, lowest, lowest - entropy, above_own])
    return table(header, rows) if rows else None


def irreducible_table(study: Study, fit: StudyFit) -> str | None:
    """E of each law of a loss beside the entropy; None where that is not known."""
    rows = [
        [*(law.metric, law.variable, law.source_of_irreducible, law.law.irreducible, law.irreducible_interval)]
        + [study.source.entropy[law.metric], law.law.irreducible - study.source.entropy[law.metric]]
        for law in fit.laws
        if law.metric in study.source.entropy
    ]
    return table(["metric", "against", "E from", "E", "E, 95 %", "entropy", "E - entropy"], rows) if rows else None
