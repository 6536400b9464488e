"""The tables of a study's report, in Markdown.

Numbers have six significant digits, so that others can compute with them. A table without rows is "".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from launchers.setup.tables import markdown_table
from launchers.study.reading import Study
from training.accounting import ACCOUNTINGS, EXACT, LABELS
from training.laws.study_data import LOSSES, METRICS
from training.laws.study_fit import Interval, LawFit, StudyFit

import numpy as np


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Write values as a Markdown table; nothing if there are no rows."""
    return markdown_table(columns, [[text(cell) for cell in row] for row in rows]) if rows else ""


def text(value: Any) -> str:
    """Write a value for a table: six significant digits, thousands apart, a dash for what is not there."""
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
    """Show every run with its two counts of parameters and its recipe."""
    header = ["run", "parameters", "eq. 8", "width", "batch", "peak rate", "epochs", "images", "points", "finished"]
    rows = []
    for run in study.runs:
        size, batch = run.size, run.config.loop.global_batch
        about = [size.name, size.num_parameters, size.eq8_parameters, run.config.model.width]
        recipe = [batch, run.config.optimizer.peak_lr(batch), round(run.epochs, 3)]
        rows.append([*about, *recipe, int(size.images[-1]), len(size.images), size.is_finished])
    return markdown(header, rows)


def metrics_table(study: Study) -> str:
    """Show the last evaluation of every run."""
    return markdown(["run", *METRICS], [[size.name, *map(size.final, METRICS)] for size in study.sizes])


def compute_table(study: Study) -> str:
    """Show the PFLOP to the last evaluation of each run by four accountings, and each divided by the exact one."""
    header = ["run", "GFLOP an image", *(f"PFLOP, {LABELS[name]}" for name in ACCOUNTINGS)]
    header += [f"{LABELS[name]} / exact" for name in ACCOUNTINGS[1:]]
    rows = []
    for size in study.sizes:
        totals = [float(size.compute(name)[-1]) for name in ACCOUNTINGS]
        ratios = [total / totals[0] for total in totals[1:]]
        rows.append([size.name, size.flops_per_image[EXACT] / 1e9, *totals, *ratios])
    return markdown(header, rows)


def laws_of(fit: StudyFit, variable: str) -> list[LawFit]:
    """Return the laws in parameters, or those in compute."""
    return [law for law in fit.laws if law.variable == variable]


def laws_table(laws: Sequence[LawFit]) -> str:
    """Show the laws with their intervals."""
    header = ["metric", "E", "E from", "E, 95 %", "beta", "beta, 95 %", "exponent", "95 %, bootstrap", "95 %, Student"]
    rows = [
        [
            *(law.metric, law.law.irreducible, law.source_of_irreducible, law.irreducible_interval),
            *(law.law.scale, law.scale_interval),
            *(law.law.exponent, law.exponent_interval, law.exponent_t_interval),
        ]
        for law in laws
    ]
    return markdown(header, rows)


def trust_table(laws: Sequence[LawFit]) -> str:
    """Show how well each law describes its own points, which does not say that it holds beyond them."""
    header = ["metric", "points", "left out", "r", "R²", "runs test, p", "largest residual"]
    rows = [
        [
            *(law.metric, len(law.x), len(law.left_out), law.pearson, law.r_squared, law.runs_test),
            f"{max(abs(math.expm1(residual)) for residual in law.residuals):.4%}" if law.residuals else None,
        ]
        for law in laws
    ]
    return markdown(header, rows)


def left_out_lines(laws: Sequence[LawFit]) -> list[str]:
    """Say which points were not used and why, once for all sizes and metrics that share a reason.

    A law's reasons read `d6, d8: too early`, or name no size.
    """
    metrics: dict[str, list[str]] = {}
    for law in laws:
        for reason in law.left_out:
            metrics.setdefault(reason, []).append(law.metric)
    all_metrics = {law.metric for law in laws}
    sizes: dict[str, list[str]] = {}
    for reason, several in metrics.items():
        names, colon, why = reason.partition(": ")
        where = "all metrics" if set(several) == all_metrics else ", ".join(several)
        sizes.setdefault(f"{why if colon else reason} ({where})", []).extend([names] if colon else [])
    return [f"{', '.join(names)}: {why}" if names else why for why, names in sizes.items()]


def held_out_table(laws: Sequence[LawFit]) -> str:
    """Show what the laws of the smaller sizes say of the largest."""
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
    return markdown(header, rows)


def sensitivity_table(laws: Sequence[LawFit]) -> str:
    """Show how the exponent moves with the E that is assumed."""
    header = ["metric", "E assumed", "exponent", "r", "worst error of the held-out sizes"]
    rows = [
        [law.metric, row.irreducible, row.exponent, row.pearson, row.held_out_nats]
        for law in laws
        for row in law.sensitivity
    ]
    return markdown(header, rows)


def frontier_table(fit: StudyFit) -> str:
    """Show the frontier's exponent by each estimator."""
    rows = [
        [metric, each.estimator, each.law.irreducible, each.law.scale, each.law.exponent, each.interval]
        for metric, several in fit.frontiers
        for each in several
    ]
    return markdown(["metric", "estimator", "E", "beta", "exponent", "95 %"], rows)


def parametric_table(fit: StudyFit) -> str:
    """Show L(N, D) of the losses."""
    header = ["metric", "E", "A", "a", "B", "b", "ab / (a + b)", "points", "R²"]
    rows = [
        [
            *(law.metric, law.irreducible, law.parameter_factor, law.parameter_exponent),
            *(law.token_factor, law.token_exponent, law.compute_exponent, law.num_points, law.r_squared),
        ]
        for law in fit.parametric
    ]
    return markdown(header, rows)


def seeds_table(fit: StudyFit) -> str:
    """Show how much the seeds of a size differ."""
    rows = [
        [*(noise.size, noise.metric, len(noise.values), min(noise.values), max(noise.values))]
        + [f"{noise.relative_deviation:.4%}"]
        for noise in fit.seeds
    ]
    return markdown(["size", "metric", "seeds", "lowest", "highest", "standard deviation / mean"], rows)


def gap_table(study: Study) -> str:
    """Show validation minus training at the end of each run whose record allows it."""
    header = ["run", "epochs", *(f"{metric}, {what}" for metric in LOSSES for what in ("training", "gap"))]
    rows: list[list[Any]] = []
    for run in study.runs:
        if run.training:
            gaps = [(run.training[metric], run.size.final(metric) - run.training[metric]) for metric in LOSSES]
            rows.append([run.size.name, round(run.epochs, 3), *(value for pair in gaps for value in pair)])
    return markdown(header, rows)


def entropy_table(study: Study) -> str:
    """Show the lowest loss of each run beside the source's entropy."""
    header = ["metric", "entropy", "the source's own loss", "run", "lowest loss", "- entropy", "- own loss"]
    rows: list[list[Any]] = []
    for metric, entropy in study.source.entropy.items():
        own = study.source.own_loss.get(metric)
        for size in study.sizes:
            lowest = float(np.nanmin(size.metrics[metric]))
            rows.append(
                [metric, entropy, own, size.name, lowest, lowest - entropy, None if own is None else lowest - own]
            )
    return markdown(header, rows)


def irreducible_table(study: Study, fit: StudyFit) -> str:
    """Show the E of each law of a loss beside the source's entropy."""
    rows = []
    for law in fit.laws:
        entropy, irreducible = study.source.entropy.get(law.metric), law.law.irreducible
        if entropy is not None:
            from_where = [law.metric, law.variable, law.source_of_irreducible]
            rows.append([*from_where, irreducible, law.irreducible_interval, entropy, irreducible - entropy])
    return markdown(["metric", "against", "E from", "E", "E, 95 %", "entropy", "E - entropy"], rows)
