"""What to train with a given compute: which size, on how many images, and how sure that is.

A parametric law L(N, D) of a study says what every size would reach if the whole budget went into it: the fewer
operations an image costs, the more images. The size with the smallest loss is the answer, and the sizes that win in
the law's bootstrap draws are its interval. Compute is exact training FLOPs (training/flops.py), so a budget in GPU time
must be worth as many of them as training reaches.

Images count as new whether or not they repeat: the law knows only what the study's runs have repeated themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.var import VARConfig
from training.flops import EXACT, FLOPS_PER_PFLOP, eq8_parameters, training_flops
from training.laws.study_data import TrainedSize
from training.laws.study_fit import Interval, ParametricFit

BILLION = 10**9
ALL_DEPTHS = tuple(range(1, 41))
TOTAL, EQ8 = "total", "eq8"
INTERVAL = (2.5, 97.5)  # per cent


@dataclass(frozen=True)
class StudyRange:
    """Where a law has been measured; what lies outside is extrapolated."""

    billions: Interval  # of parameters, counted as the law counts them
    billion_tokens: Interval
    pflop: Interval  # exact
    counted_parameters: str = TOTAL  # or EQ8

    def __post_init__(self) -> None:
        if self.counted_parameters not in (TOTAL, EQ8):
            raise ValueError(f"counted_parameters is '{self.counted_parameters}'; set '{TOTAL}' or '{EQ8}'")

    def count(self, config: VARConfig) -> float:
        """The N of the law, in billions."""
        total = config.num_parameters if self.counted_parameters == TOTAL else eq8_parameters(config)
        return total / BILLION

    def beyond(self, *, billions: float, billion_tokens: float, pflop: float) -> tuple[str, ...]:
        """Which of the three lie outside."""
        values = {"parameters": billions, "tokens": billion_tokens, "compute": pflop}
        ranges = {"parameters": self.billions, "tokens": self.billion_tokens, "compute": self.pflop}
        return tuple(name for name, value in values.items() if not ranges[name].low <= value <= ranges[name].high)


@dataclass(frozen=True)
class Candidate:
    """One size, if the whole budget goes into it."""

    depth: int
    num_parameters: int  # all of them
    images: int
    tokens: int
    epochs: float
    loss: float  # predicted, nats
    interval: Interval  # of the prediction
    share_of_draws: float  # in which this size is the best
    beyond: tuple[str, ...]  # outside the study: parameters, tokens, compute


@dataclass(frozen=True)
class Allocation:
    """How to spend a budget, by the law of one loss."""

    metric: str
    pflop: float
    candidates: tuple[Candidate, ...]  # smallest first
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        return min(self.candidates, key=lambda candidate: candidate.loss)

    @property
    def winners(self) -> tuple[int, ...]:
        """The depths that are best in some draw of the bootstrap."""
        return tuple(candidate.depth for candidate in self.candidates if candidate.share_of_draws > 0)

    @property
    def interval(self) -> tuple[int, int]:
        """The least and the greatest of the depths that are best in 95 % of the draws."""
        below = np.cumsum([candidate.share_of_draws for candidate in self.candidates]) * 100
        # a hair below each bound: sums of shares such as 0.025 are not exact
        low, high = (int(np.searchsorted(below, percent - 1e-9)) for percent in INTERVAL)
        return self.candidates[low].depth, self.candidates[high].depth


def pflop_of_gpu_days(days: float, *, tflops: float, utilisation: float) -> float:
    """PFLOP of so many days of one GPU with a peak of `tflops` (1e12 operations a second), used to that share."""
    for name, value in (("gpu_days", days), ("gpu_tflops", tflops), ("utilisation", utilisation)):
        if not value > 0:
            raise ValueError(f"{name} {value} must be above 0")
    if utilisation > 1:
        raise ValueError(f"utilisation {utilisation} must be at most 1: it is a share of the peak")
    return days * 86_400 * tflops * 1e12 * utilisation / FLOPS_PER_PFLOP


def study_range(runs: Sequence[TrainedSize], *, counted_parameters: str = TOTAL) -> StudyRange:
    """The sizes, tokens and compute that the runs' evaluations span."""
    runs = [run for run in runs if len(run.images)]
    if not runs:
        raise ValueError("no run of the study has an evaluation; train first, then plan")
    counts = [run.num_parameters if counted_parameters == TOTAL else run.eq8_parameters for run in runs]
    tokens = np.concatenate([run.images * run.tokens_per_image for run in runs])
    compute = np.concatenate([run.compute(EXACT) for run in runs])
    return StudyRange(
        billions=_span(np.array(counts) / BILLION),
        billion_tokens=_span(tokens / BILLION),
        pflop=_span(compute),
        counted_parameters=counted_parameters,
    )


def allocate(
    fit: ParametricFit,
    pflop: float,
    *,
    template: VARConfig,
    depths: Sequence[int],
    study: StudyRange,
    images_per_epoch: int,
) -> Allocation:
    """Every size of `depths` (ALL_DEPTHS where empty) with the whole budget, and which is best.

    template: what the sizes share; its depth is not used. Raises ValueError where the budget is not positive, does not
    pay for one image of any size, or where the fit has no bootstrap draws.
    """
    if not pflop > 0:
        raise ValueError(f"the budget is {pflop} PFLOP; set plan.pflop or plan.gpu_days above 0")
    if images_per_epoch < 1:
        raise ValueError(f"images_per_epoch {images_per_epoch} must be 1 or more")
    if not fit.draws:
        raise ValueError(f"the fit of {fit.metric} has no bootstrap draws, so no interval; fit again with more draws")
    configs = [replace(template, depth=depth) for depth in sorted(set(depths or ALL_DEPTHS))]
    images = {config: int(pflop * FLOPS_PER_PFLOP / training_flops(config)) for config in configs}
    paid = [config for config in configs if images[config] > 0]
    if not paid:
        raise ValueError(
            f"{pflop:g} PFLOP do not pay for one image of the smallest size, d{configs[0].depth}, which takes "
            f"{training_flops(configs[0]) / FLOPS_PER_PFLOP:.3g}; give more, or smaller depths"
        )
    billions = np.array([study.count(config) for config in paid])
    tokens = [images[config] * config.scales.num_tokens for config in paid]
    losses = fit(billions, np.array(tokens) / BILLION)  # (M,)
    drawn = _losses_of_draws(fit, billions, np.array(tokens) / BILLION)  # (draws, M)
    wins = np.bincount(drawn.argmin(axis=1), minlength=len(paid)) / len(drawn)
    low, high = np.percentile(drawn, INTERVAL, axis=0)
    candidates = tuple(
        Candidate(
            depth=config.depth,
            num_parameters=config.num_parameters,
            images=images[config],
            tokens=tokens[i],
            epochs=images[config] / images_per_epoch,
            loss=float(losses[i]),
            interval=Interval(float(low[i]), float(high[i])),
            share_of_draws=float(wins[i]),
            beyond=study.beyond(billions=float(billions[i]), billion_tokens=tokens[i] / BILLION, pflop=pflop),
        )
        for i, config in enumerate(paid)
    )
    found = Allocation(fit.metric, pflop, candidates, notes=())
    return replace(found, notes=_notes(found, study))


def _losses_of_draws(fit: ParametricFit, billions: np.ndarray, billion_tokens: np.ndarray) -> np.ndarray:
    """The losses of M sizes by each draw: (draws, M)."""
    draws = np.array(fit.draws, dtype=np.float64)
    irreducible, a_factor, a, b_factor, b = draws.T[:, :, None]
    return irreducible + a_factor * billions**-a + b_factor * billion_tokens**-b


def _notes(found: Allocation, study: StudyRange) -> tuple[str, ...]:
    """What a reader must know before spending the budget."""
    best, depths, notes = found.best, [candidate.depth for candidate in found.candidates], []
    if best.beyond:
        spans = {
            "parameters": f"{study.billions.low:.5g} to {study.billions.high:.5g} billion parameters",
            "tokens": f"{study.billion_tokens.low:.5g} to {study.billion_tokens.high:.5g} billion tokens",
            "compute": f"{study.pflop.low:.5g} to {study.pflop.high:.5g} PFLOP",
        }
        measured = ", ".join(spans[name] for name in best.beyond)
        notes.append(f"d{best.depth} with this budget is an extrapolation: the study has measured {measured}.")
    if len(depths) > 1 and best.depth in (depths[0], depths[-1]):
        which, other = ("smallest", "smaller") if best.depth == depths[0] else ("largest", "larger")
        notes.append(f"d{best.depth} is the {which} size considered; a {other} one may be better still.")
    if len(found.winners) > 1:
        low, high = found.interval
        notes.append(
            f"{best.share_of_draws:.0%} of the bootstrap draws choose d{best.depth}, 95 % of them d{low} to d{high}."
        )
    return tuple(notes)


def _span(values: np.ndarray) -> Interval:
    return Interval(float(values.min()), float(values.max()))
