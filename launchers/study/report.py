"""The verb `report` of launchers/scaling_study.py: FOLDER/report.md with Figs. 5 and 6, and what they do not show.

What the report says of a law follows the fits; what it says of its limits follows the runs. Nothing in it is a constant
of one study.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from launchers.setup.command_line import Command, say
from data_pipeline.files.atomic import atomic_file
from launchers.study import tables
from launchers.study.config import StudyConfig, study_name
from launchers.study.fitting import FIT, POINTS, FittedStudy, describe_study, fitted_study, write_fit
from launchers.study.page import REPORT, publish
from launchers.study.reading import Study, read_study
from models.var import VARConfig
from training.accounting import EXACT
from training.laws.study_data import LOSSES
from training.laws.study_fit import COMPUTE, EQ8, PARAMETERS, TOTAL, FitConfig, Interval, LawFit, StudyFit

FIGURE_5, FIGURE_6 = "fig5.png", "fig6.png"
FRONTIER = (
    "The frontier is the lowest curve at log-spaced compute, where a size inside the study has it and no smaller "
    "compute has reached a lower value. Curves are interpolated between their evaluations, so the frontier has more "
    "points than were measured; its intervals are drawn over sizes. The draws do not know the estimator's own bias, "
    "0.2 to 0.7 % of the exponent on planted studies of twelve sizes. Therefore the bootstrap's interval of an "
    "exponent is widened on both sides by its distance to the exponent of L(N, D), or of the non-dominated evaluations "
    "without L(N, D). Student's interval, the bands and the interval of beta leave the bias out."
)
GATE = (
    "The gate: laws fitted without the largest sizes, and what they say of them. A prediction passes if its error is "
    "at most {gate:.2%} of the measured reducible part and, because an error rate hardly falls at all, at most "
    "{gate_of_gain:.0%} of the fall that the law predicts from the sizes it was fitted to. The gate sees only a large "
    "error of E. Of planted studies with twelve sizes and noise of 0.1 %, 1 in 10 passes if E is too low by 70 % or "
    "too high by 30 % of what the largest size has above it. But 8 in 10 pass if E is too low by 30 % or too high by "
    "15 %, and their exponents are 15 and 9 % wrong."
)


def launch_report(command: Command[StudyConfig]) -> None:
    """Write report.md and its figures, and show them in MLflow."""
    config = command.config
    folder = Path(config.folder)
    if command.dry_run:
        say(f"{describe_study(read_study(config))}; would write {REPORT}, {FIGURE_5} and {FIGURE_6} to {folder}")
        return
    from launchers.figures.scaling import draw_compute_laws, draw_size_laws  # matplotlib takes half a second

    found = fitted_study(config)
    if found.is_new:
        write_fit(config, found)
    has_size_laws = bool(tables.laws_of(found.fit, PARAMETERS))
    if has_size_laws:
        draw_size_laws(folder / FIGURE_5, found.study.sizes, found.fit)
    else:
        (folder / FIGURE_5).unlink(missing_ok=True)
    draw_compute_laws(folder / FIGURE_6, found.study.sizes, found.fit)
    with atomic_file(folder / REPORT) as file:
        file.write(compose_report(found, config).encode())
    figure_5 = FIGURE_5 if has_size_laws else f"no {FIGURE_5}, since there is no law by parameters,"
    say(f"wrote {folder / REPORT}, {figure_5} and {FIGURE_6}")
    if config.tracking.mlflow:
        publish(config)


def compose_report(found: FittedStudy, config: StudyConfig) -> str:
    """Write the report as Markdown."""
    study, fit = found.study, found.fit
    by_size = tables.laws_of(fit, PARAMETERS)
    parts = [
        *(f"# Scaling study {study_name(config)}", *_measured(study, fit)),
        "## Loss and error against model size",
        f"![the laws in parameters]({FIGURE_5})" if by_size else "",
        *_laws(by_size, config.fit),
        *("## Loss and error against compute", f"![the laws in compute]({FIGURE_6})", FRONTIER),
        *_laws(tables.laws_of(fit, COMPUTE), config.fit),
        *_frontiers(fit),
        *_checks(study, fit),
        *(["## Notes of the fit", _lines(fit.notes)] if fit.notes else []),
        *("## What this shows", _lines(shown(study, fit)), "## What this does not show", _lines(not_shown(study))),
        f"Every point is in `{POINTS}`, every number with all its digits in `{FIT}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _measured(study: Study, fit: StudyFit) -> list[str]:
    counted = {TOTAL: "all parameters", EQ8: "those of eq. 8, 18 d w²"}[fit.counted_parameters]
    return [
        f"{describe_study(study)}. Every evaluation is of the whole validation set, with true labels; losses are "
        "cross-entropies in nats a token, errors are shares of tokens.",
        f"A law is y = E + (beta x)^alpha. x is N, {counted} in billions, or C, compute in PFLOP (10^15 operations in "
        f"all, not per second) by the accounting `{fit.accounting}`. Intervals hold 95 %.",
        tables.runs_table(study),
        tables.metrics_table(study),
        "Compute to the last evaluation, by four accountings. Training FLOPs are the exact count: six operations a "
        "multiply-accumulate, attention over the pairs that carry information, AdaLN once an image. A dense mask has "
        "attention over all pairs. 6 N T is 6 × parameters × tokens. The last is one forward pass in "
        "multiply-accumulates, the likeliest reading of the paper's C.",
        tables.compute_table(study),
    ]


def _laws(laws: Sequence[LawFit], config: FitConfig) -> list[str]:
    if not laws:
        return ["No law was found; the notes say why."]
    parts = [
        tables.laws_table(laws),
        "Residuals are of the loss or error itself, E included. About a law of the right form their signs are in "
        "disorder; a small p of the runs test says that they are not.",
        tables.trust_table(laws),
    ]
    if left_out := tables.left_out_lines(laws):
        parts += ["Points that were not used:", _lines(left_out)]
    if held_out := tables.held_out_table(laws):
        parts += [GATE.format(gate=config.gate, gate_of_gain=config.gate_of_gain), held_out]
    if sensitivity := tables.sensitivity_table(laws):
        parts += ["How the exponent moves with E. Pearson's r hardly does, and is no sign of the right E.", sensitivity]
    return parts


def _frontiers(fit: StudyFit) -> list[str]:
    frontiers = tables.frontier_table(fit)
    parts = ["### The frontier by three estimators", frontiers] if frontiers else []
    if parametric := tables.parametric_table(fit):
        form = "L(N, D) = E + A N^-a + B D^-b, N in billions of parameters, D in billions of tokens."
        parts += [f"### The loss of N and D\n\n{form}", parametric]
    return parts


def _checks(study: Study, fit: StudyFit) -> list[str]:
    parts = []
    if seeds := tables.seeds_table(fit):
        parts += ["## Noise between seeds", seeds]
    if gap := tables.gap_table(study):
        remark = (
            "Training losses are means over the newest steps (5 % of the run, 500 at most). Training drops labels and "
            "skips blocks at random where its config says so, which validation does not do: equal losses would not be "
            "a gap of 0."
        )
        parts += ["## Training and validation", gap, remark]
    if entropy := tables.entropy_table(study):
        remark = (
            "The source's own loss is that of its true probabilities on the validation set, which is a sample. The E "
            "of a law in N is what endless models would reach on these data in this time: it may lie above."
        )
        parts += ["## Against the source's entropy", entropy, remark, tables.irreducible_table(study, fit)]
    return parts


def shown(study: Study, fit: StudyFit) -> list[str]:
    """Say what the numbers show, one sentence each."""
    sentences, known = [], study.source.entropy
    for variable in (PARAMETERS, COMPUTE):
        gates = [point for law in tables.laws_of(fit, variable) for point in law.held_out]
        if gates:
            passed = sum(point.passed for point in gates)
            sentences.append(
                f"Against {variable}, {passed} of {len(gates)} predictions of held-out sizes pass the gate; the "
                f"largest error is {max(point.share for point in gates):.2%} of what is reducible, and "
                f"{max(point.share_of_gain for point in gates):.0%} of the fall that was predicted."
            )
    sentences += [_falls(study, metric) for metric in LOSSES]
    sentences += [_above(study, metric) for metric in known]
    for law in fit.laws:
        if law.irreducible_interval and law.metric in known:
            sentences.append(_agreement(study, law, law.irreducible_interval))
    return sentences


def _agreement(study: Study, law: LawFit, interval: Interval) -> str:
    """Say whether the interval of a fitted E holds the entropy."""
    entropy = study.source.entropy[law.metric]
    holds = interval.low <= entropy <= interval.high
    return (
        f"Against {law.variable}, the E that was fitted to {law.metric}, {law.law.irreducible:.6g}, "
        f"{'agrees' if holds else 'does NOT agree'} with the entropy, {entropy:.6g}: its interval is "
        f"{interval.low:.6g} to {interval.high:.6g}."
    )


def _falls(study: Study, metric: str) -> str:
    """Say whether the last loss falls from each size to the next, by the mean of its seeds."""
    ends: dict[str, list[float]] = {}
    for run in sorted(study.sizes, key=lambda run: run.num_parameters):
        if run.is_finished:
            ends.setdefault(run.size, []).append(run.final(metric))
    means = {name: sum(values) / len(values) for name, values in ends.items()}
    if len(means) < 2:
        return f"Fewer than two sizes are finished, so that nothing is said of {metric}."
    names = list(means)
    rises = [b for a, b in pairwise(names) if not means[b] < means[a]]
    if rises:
        return f"{metric} does NOT fall with every size: not from the one before to {', '.join(rises)}."
    return f"{metric} falls with every size, from {means[names[0]]:.6g} to {means[names[-1]]:.6g}."


def _above(study: Study, metric: str) -> str:
    """Say whether a model beat the bound, which on a finite validation set is the source's own loss."""
    own = metric in study.source.own_loss
    bound = (study.source.own_loss if own else study.source.entropy)[metric]
    what = f"what the source itself loses on the validation set, {bound:.6g}" if own else f"the entropy, {bound:.6g}"
    below = sorted({size.name for size in study.sizes if (size.metrics[metric] < bound).any()})
    if below:
        return f"{metric} of {', '.join(below)} went BELOW {what}: something leaks, or the set is too small to tell."
    return f"No evaluation of {metric} lies below {what}."


def not_shown(study: Study) -> list[str]:
    """Say what nobody may read from this study, one sentence each."""
    sizes, runs = study.sizes, study.runs
    smallest, largest = min(s.num_parameters for s in sizes), max(s.num_parameters for s in sizes)
    spent = [float(size.compute(EXACT)[-1]) for size in sizes]
    sentences = [
        f"Nothing was measured below {smallest:,} or above {largest:,} parameters, nor above {max(spent):.6g} PFLOP: "
        "what a law says there is an extrapolation.",
        "All sizes lie on one line of shapes, width and heads following from the depth; other shapes may differ.",
        "Pearson's r is near -1 for wrong laws too. The held-out sizes are the test.",
        "C_min is the frontier of these curves, not compute at the critical batch size, for which Kaplan et al. have "
        "the same symbol.",
    ]
    if any(run.config.optimizer.final_lr_ratio < 1 for run in runs):
        sentences.append(
            "Learning rates decay over each run, so that a point before its end is not what a run of that length would "
            "have reached: the frontier is pessimistic there."
        )
    recipes = {(run.config.loop.global_batch, run.config.optimizer.base_lr, run.config.loop.epochs) for run in runs}
    if len(recipes) > 1:
        sentences.append("Batch, learning rate or length differ between sizes, so that size is not all that changes.")
    if max(run.epochs for run in runs) > 1:
        sentences.append(
            f"Training data were seen up to {max(run.epochs for run in runs):,.1f} times: laws in tokens are of "
            "repeated ones."
        )
    model, paper = runs[0].config.model, VARConfig(depth=16)
    if (model.patch_nums, model.num_classes) != (paper.patch_nums, paper.num_classes):
        sentences.append(
            f"These are not the paper's data ({model.num_classes} classes, {model.scales.num_tokens} tokens an image): "
            "its exponents, errors and correlations on ImageNet are not reproduced here."
        )
    return sentences
