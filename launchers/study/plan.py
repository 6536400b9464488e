"""The verbs `plan` and `paper` of launchers/scaling_study.py.

`plan` says what to train with a given compute, by a study's own laws. `paper` says whether the laws that the paper
prints fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from launchers.setup.command_line import Command, say
from launchers.setup.tables import table
from launchers.study.config import PlanConfig, StudyConfig
from launchers.study.fitting import FittedStudy, fitted_study
from launchers.study.reading import Study
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512
from models.var import VARConfig
from training.accounting import EXACT, IMAGENET_IMAGES, PAPER
from training.flops import eq8_parameters, flops_per_image, training_flops
from training.laws.allocation import Allocation, Candidate, Size, allocate, pflop_of_gpu_days, study_range
from training.laws.paper_laws import (
    PAPER_EPOCHS,
    PAPER_LAWS,
    Laws,
    TrainedModel,
    eq20,
    eq21,
    generation_costs,
    growth,
    implied_compute,
    notes,
)
from training.laws.study_data import METRICS
from training.laws.study_fit import TOTAL, ParametricFit, StudyFit

ALL_DEPTHS = tuple(range(1, 41))
MAX_PFLOP = 1e15  # a million times the paper's largest training
NEIGHBOURS = 2  # sizes shown on either side of those that may be the best


def launch_plan(command: Command[StudyConfig]) -> None:
    """Answer by every law L(N, D) of the study; nothing is written."""
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
    """Return the budget in PFLOP. Raises ValueError if none or two were given, or one out of range."""
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
    """Spend the budget by one law, on models that differ from the study's only in their depth."""
    template = study.runs[0].config.model
    sizes = []
    for depth in sorted(set(config.depths or ALL_DEPTHS)):
        model = replace(template, depth=depth)
        total = model.num_parameters
        counted = total if fit.counted_parameters == TOTAL else eq8_parameters(model)
        sizes.append(Size(depth, total, counted, model.scales.num_tokens, training_flops(model)))
    spans = study_range(study.sizes, counted_parameters=fit.counted_parameters)
    return allocate(law, pflop, sizes, study=spans, images_per_epoch=study.runs[0].num_samples)


def plan_lines(allocation: Allocation, *, shows_all: bool) -> list[str]:
    """Write the answer and the sizes around it, or all sizes."""
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
    lines += table(header, [_row(candidate) for candidate in shown]).splitlines()
    return [*lines, *(f"note: {note}" for note in allocation.notes)]


def warnings(allocation: Allocation, law: ParametricFit, found: FittedStudy) -> list[str]:
    """Say why this plan should not be followed: what the fit says against its law, and losses that cannot be."""
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
    """Show the paper's laws and what does not fit together."""
    say("\n".join(paper_lines(PAPER_LAWS, paper_models())))


def paper_models() -> list[TrainedModel]:
    """Return the paper's sizes whose length of training is known, smallest first."""
    models = []
    for depth, epochs in PAPER_EPOCHS.items():
        config = VARConfig(depth=depth)
        images = epochs * IMAGENET_IMAGES
        models.append(TrainedModel(f"d{depth}", config.num_parameters, flops_per_image(config), images))
    return models


def paper_lines(laws: Laws, models: Sequence[TrainedModel]) -> list[str]:
    """Write eight laws, the compute that each pair of them implies at every size, and what does not fit together."""
    rows = []
    for metric, exponent in growth(laws).items():
        by_parameters, by_compute = laws.by_parameters[metric], laws.by_compute[metric]
        first = f"({by_parameters.scale:g} N)^{by_parameters.exponent:g}"
        rows.append((metric, first, f"({by_compute.scale:g} C)^{by_compute.exponent:g}", f"C^{exponent:.2f}"))
    sizes = []
    for size in implied_compute(laws, models):
        implied = (f"{size.by_metric[metric]:.3g}" for metric in METRICS)
        sizes.append((size.name, *implied, f"{size.spent[EXACT]:.3g}", f"{size.spent[PAPER]:.3g}"))
    return [
        "The laws, as printed (eqs. 11 to 16):",
        table(("metric", "against N (billions)", "against C (PFLOP)", "N grows as"), rows),
        "",
        "PFLOP at which a law in C reaches what the law in N gives, by metric; beside it what training has taken:",
        table(("size", *METRICS, "training FLOPs", "forward MACs"), sizes),
        "",
        *(f"note: {note}" for note in notes(laws, models)),
        "",
        *appendix_b_lines(),
    ]


def appendix_b_lines() -> list[str]:
    """Write the attention pairs of an image in raster order and by scales (Appendix B), and check eq. 21."""
    rows = []
    for patch_nums in (PATCH_NUMS_256, PATCH_NUMS_512):
        for cost in generation_costs(patch_nums):
            rows.append((f"{patch_nums[-1]}", cost.name, f"{cost.pairs:,}", f"{cost.steps:,}", f"{cost.tokens:,}"))
    whole, printed = eq20(5, 2), eq21(16, 2)
    return [
        "Attention pairs of an image of 256 and of 512 px, exactly (Appendix B compares those without a cache):",
        table(("side", "way", "pairs of a layer and head", "steps", "tokens"), rows),
        "",
        f"note: eq. 21 is right as printed: for sides 1, 2, 4, 8, 16 it gives {printed:,.0f}, the sum of eq. 20 "
        f"{float(whole):,.0f}.",
    ]
