"""What to train with a given compute: which size, on how many images, and how sure that is.

A law L(N, D) of a study predicts what every size would reach if the whole budget went into it: the fewer operations an
image costs, the more images. The size with the smallest predicted loss is the answer; the sizes that win in the law's
bootstrap draws are its interval. Compute is in exact training FLOPs (training/flops.py). Repeated images count as new
ones, because the law knows only the repetition that the study's runs have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.accounting import BILLION, EXACT, FLOPS_PER_PFLOP
from training.laws.study_data import TrainedSize
from training.laws.study_fit import Interval, ParametricFit

INTERVAL = (2.5, 97.5)  # per cent
UNITS = {"parameters": "billion parameters", "tokens": "billion tokens", "compute": "PFLOP"}


@dataclass(frozen=True)
class Size:
    """The facts of a size that could be trained."""

    depth: int
    num_parameters: int  # all of them
    counted: int  # parameters as the law counts them
    tokens_per_image: int
    flops_per_image: int  # exact


@dataclass(frozen=True)
class Candidate:
    """The prediction for one size if the whole budget goes into it."""

    depth: int
    num_parameters: int  # all of them
    images: int
    tokens: int
    epochs: float
    loss: float  # nats
    interval: Interval  # of the loss
    share_of_draws: float  # in which this size is the best
    beyond: tuple[str, ...]  # what lies outside the study: parameters, tokens, compute


@dataclass(frozen=True)
class Allocation:
    """The ways to spend a budget, by the law of one loss."""

    metric: str
    pflop: float
    candidates: tuple[Candidate, ...]  # smallest first
    notes: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        """The candidate with the smallest predicted loss."""
        return min(self.candidates, key=lambda candidate: candidate.loss)

    @property
    def winners(self) -> tuple[int, ...]:
        """The depths that are best in some draw of the bootstrap."""
        return tuple(candidate.depth for candidate in self.candidates if candidate.share_of_draws > 0)

    @property
    def interval(self) -> tuple[int, int]:
        """The smallest and the largest of the depths that are best in 95 % of the draws."""
        below = np.cumsum([candidate.share_of_draws for candidate in self.candidates]) * 100
        # a hair below each bound: sums of shares such as 0.025 are not exact
        low, high = (int(np.searchsorted(below, percent - 1e-9)) for percent in INTERVAL)
        return self.candidates[low].depth, self.candidates[high].depth


def pflop_of_gpu_days(days: float, *, tflops: float, utilisation: float) -> float:
    """Convert days of one GPU with a peak of `tflops` (1e12 operations a second), of which it reaches that share."""
    for name, value in (("gpu_days", days), ("gpu_tflops", tflops), ("utilisation", utilisation)):
        if not value > 0:
            raise ValueError(f"{name} {value} must be above 0")
    if utilisation > 1:
        raise ValueError(f"utilisation {utilisation} must be at most 1: it is a share of the peak")
    return days * 86_400 * tflops * 1e12 * utilisation / FLOPS_PER_PFLOP


def study_range(runs: Sequence[TrainedSize], *, counted_parameters: str) -> dict[str, Interval]:
    """Return what the runs' evaluations span, in UNITS by its names; a prediction outside is an extrapolation."""
    measured = {
        "parameters": np.asarray([run.counted(counted_parameters) for run in runs]) / BILLION,
        "tokens": np.concatenate([run.images * run.tokens_per_image for run in runs]) / BILLION,
        "compute": np.concatenate([run.compute(EXACT) for run in runs]),
    }
    return {name: Interval(float(values.min()), float(values.max())) for name, values in measured.items()}


def allocate(
    fit: ParametricFit, pflop: float, sizes: Sequence[Size], *, study: Mapping[str, Interval], images_per_epoch: int
) -> Allocation:
    """Spend the whole budget on every size, smallest first, and predict the losses.

    Raises:
        ValueError: the budget does not pay for one image of any size.
    """
    images = [int(pflop * FLOPS_PER_PFLOP / size.flops_per_image) for size in sizes]
    paid = [(size, count) for size, count in zip(sizes, images, strict=True) if count > 0]
    if not paid:
        raise ValueError(
            f"{pflop:g} PFLOP do not pay for one image of the smallest size, d{sizes[0].depth}, which takes "
            f"{sizes[0].flops_per_image / FLOPS_PER_PFLOP:.3g}; give more, or smaller depths"
        )
    billions = np.asarray([size.counted / BILLION for size, _ in paid])
    tokens = [size.tokens_per_image * count for size, count in paid]
    losses = fit(billions, np.asarray(tokens) / BILLION)  # (M,)
    irreducible, a_factor, a, b_factor, b = np.asarray(fit.draws, dtype=np.float64).T[:, :, None]
    drawn = irreducible + a_factor * billions**-a + b_factor * (np.asarray(tokens) / BILLION) ** -b  # (draws, M)
    wins = np.bincount(drawn.argmin(axis=1), minlength=len(paid)) / len(drawn)
    low, high = np.percentile(drawn, INTERVAL, axis=0)
    candidates = []
    for i, (size, count) in enumerate(paid):
        asked = {"parameters": billions[i], "tokens": tokens[i] / BILLION, "compute": pflop}
        candidates.append(
            Candidate(
                depth=size.depth,
                num_parameters=size.num_parameters,
                images=count,
                tokens=tokens[i],
                epochs=count / images_per_epoch,
                loss=float(losses[i]),
                interval=Interval(float(low[i]), float(high[i])),
                share_of_draws=float(wins[i]),
                beyond=tuple(name for name in UNITS if not study[name].low <= asked[name] <= study[name].high),
            )
        )
    found = Allocation(fit.metric, pflop, tuple(candidates), notes=())
    return replace(found, notes=_notes(found, study))


def _notes(found: Allocation, study: Mapping[str, Interval]) -> tuple[str, ...]:
    """Say what a reader must know before spending the budget."""
    best, depths, notes = found.best, [candidate.depth for candidate in found.candidates], []
    if best.beyond:
        measured = ", ".join(f"{study[name].low:.5g} to {study[name].high:.5g} {UNITS[name]}" for name in best.beyond)
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
