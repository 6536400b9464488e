"""The verbs `plan` and `paper` of launchers/scaling_study.py.

What to train with a given compute, by a study's own laws; and whether the laws that the paper prints fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launchers.setup.command_line import Command, say
from launchers.study.config import PlanConfig, StudyConfig
from launchers.study.fitting import FittedStudy, fitted_study
from launchers.study.reading import Study
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512, Scales
from training.laws.allocation import Allocation, Candidate, allocate, pflop_of_gpu_days, study_range
from training.laws.complexity import eq21, generation_costs, geometric_var_pairs
from training.laws.paper_laws import PAPER_LAWS, PAPER_MODELS, Laws, TrainedModel, growth, implied_compute, notes
from training.laws.study_data import METRICS
from training.laws.study_fit import ParametricFit, StudyFit

MAX_PFLOP = 1e15  # a million times the paper's largest training
NEIGHBOURS = 2  # sizes shown on either side of those that may be the best


def launch_plan(command: Command[StudyConfig]) -> None:
    pflop = budget(command.config.plan)
    say(f"budget: {pflop:,.6g} PFLOP of training (1e15 operations, exact count)")
    if command.dry_run:
        return
    found = fitted_study(command.config)
    if not found.fit.parametric:
        raise ValueError(
            f"{command.config.folder}: its runs are too few for L(N, D), from which a plan is made; train more sizes"
        )
    for law in found.fit.parametric:
        allocation = allocate_with(law, found.study, found.fit, command.config.plan, pflop)
        lines = plan_lines(allocation, shows_all=bool(command.config.plan.depths))
        say("\n" + "\n".join([*lines, *(f"warning: {text}" for text in warnings(allocation, law, found))]))


def budget(config: PlanConfig) -> float:
    """PFLOP, however they were given. Raises ValueError where none or two budgets were, or one out of range."""
    if bool(config.pflop) == bool(config.gpu_days):
        given = "both plan.pflop and plan.gpu_days are" if config.pflop else "no budget is"
        raise ValueError(f"{given} given; write plan.pflop=NUMBER or plan.gpu_days=NUMBER")
    pflop = config.pflop
    if config.gpu_days:
        pflop = pflop_of_gpu_days(config.gpu_days, tflops=config.gpu_tflops, utilisation=config.utilisation)
    if not 0 < pflop <= MAX_PFLOP:
        raise ValueError(f"the budget is {pflop:g} PFLOP; accepted: above 0, up to {MAX_PFLOP:g}")
    return pflop


def allocate_with(law: ParametricFit, study: Study, fit: StudyFit, config: PlanConfig, pflop: float) -> Allocation:
    """The budget spent by one law, on models that are like the study's but for their depth."""
    first = study.runs[0]
    return allocate(
        law,
        pflop,
        template=first.config.model,
        depths=config.depths,
        study=study_range(study.sizes, counted_parameters=fit.counted_parameters),
        images_per_epoch=first.num_samples,
    )


def plan_lines(allocation: Allocation, *, shows_all: bool) -> list[str]:
    """The answer, and the sizes around it; all of them if asked."""
    best, winners = allocation.best, allocation.winners
    certainty = "best in every draw"
    if len(winners) > 1:
        certainty = f"d{min(winners)} to d{max(winners)} are best in some draw"
    lines = [
        f"by {allocation.metric}: train d{best.depth} on {best.images:,} images, for {best.loss:.5f} nats "
        f"[{best.interval.low:.5f}, {best.interval.high:.5f}]; {certainty}"
    ]
    shown = allocation.candidates if shows_all else _near(allocation.candidates, (*winners, best.depth))
    header = ("size", "parameters", "images", "tokens", "epochs", "loss", "95 %", "best in", "beyond the study")
    lines += aligned([header, *(_row(candidate) for candidate in shown)])
    return [*lines, *(f"note: {note}" for note in allocation.notes)]


def warnings(allocation: Allocation, law: ParametricFit, found: FittedStudy) -> list[str]:
    """Why this plan should not be followed: what the fit says against its law, and losses that cannot be."""
    texts = [note for note in found.fit.notes if note.startswith(f"L(N, D) of {law.metric}")]
    entropy = found.study.source.entropy.get(law.metric)
    impossible = [f"d{each.depth}" for each in allocation.candidates if entropy is not None and each.loss < entropy]
    if impossible:
        texts.append(
            f"the losses predicted for {', '.join(impossible)} lie below the source's entropy, {entropy:.5f} nats: no "
            "model can have them"
        )
    return texts


def _near(candidates: Sequence[Candidate], depths: Sequence[int]) -> Sequence[Candidate]:
    places = [place for place, candidate in enumerate(candidates) if candidate.depth in depths]
    return candidates[max(0, min(places) - NEIGHBOURS) : max(places) + 1 + NEIGHBOURS]


def _row(candidate: Candidate) -> tuple[str, ...]:
    return (
        f"d{candidate.depth}",
        f"{candidate.num_parameters:,}",
        f"{candidate.images:,}",
        f"{candidate.tokens:,}",
        f"{candidate.epochs:,.2f}",
        f"{candidate.loss:.5f}",
        f"{candidate.interval.low:.5f} to {candidate.interval.high:.5f}",
        f"{candidate.share_of_draws:.1%}",
        ", ".join(candidate.beyond) or "-",
    )


def launch_paper(command: Command[Any]) -> None:
    say("\n".join(paper_lines(PAPER_LAWS, PAPER_MODELS)))


def paper_lines(laws: Laws, models: Sequence[TrainedModel]) -> list[str]:
    """Eight laws, the compute that each pair of them implies at every size, and what does not fit together."""
    rows = [("metric", "against N (billions)", "against C (PFLOP)", "N grows as")]
    for metric, exponent in growth(laws).items():
        by_parameters, by_compute = laws.by_parameters[metric], laws.by_compute[metric]
        first = f"({by_parameters.scale:g} N)^{by_parameters.exponent:g}"
        rows.append((metric, first, f"({by_compute.scale:g} C)^{by_compute.exponent:g}", f"C^{exponent:.2f}"))
    sizes = [("size", *METRICS, "training FLOPs", "forward MACs")]
    for size in implied_compute(laws, models):
        implied = (f"{size.by_metric[metric]:.3g}" for metric in METRICS)
        sizes.append((size.name, *implied, f"{size.spent['exact']:.3g}", f"{size.spent['paper']:.3g}"))
    return [
        "The laws, as printed (eqs. 11 to 16):",
        *aligned(rows),
        "",
        "PFLOP at which a law in C reaches what the law in N gives, by metric; beside it what training has taken:",
        *aligned(sizes),
        "",
        *(f"note: {note}" for note in notes(laws, models)),
        "",
        *appendix_b_lines(),
    ]


def appendix_b_lines() -> list[str]:
    """Attention pairs of an image in raster order and by scales (Appendix B), and whether eq. 21 is right."""
    rows = [("side", "way", "pairs of a layer and head", "steps", "tokens")]
    for patch_nums in (PATCH_NUMS_256, PATCH_NUMS_512):
        for cost in generation_costs(Scales(patch_nums)):
            rows.append((f"{patch_nums[-1]}", cost.name, f"{cost.pairs:,}", f"{cost.steps:,}", f"{cost.tokens:,}"))
    whole, printed = geometric_var_pairs(5, 2), eq21(16, 2)
    return [
        "Attention pairs of an image of 256 and of 512 px, exactly (Appendix B compares those without a cache):",
        *aligned(rows),
        "",
        f"note: eq. 21 is right as printed: for sides 1, 2, 4, 8, 16 it gives {printed:,.0f}, the sum of eq. 20 "
        f"{float(whole):,.0f}.",
    ]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
