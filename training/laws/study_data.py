"""The runs of a study as arrays, and one curve a size made of them: seeds averaged, unusable evaluations left out.

A size is all runs whose names differ only in their `-seedN`. Left out are evaluations that are not finite or not in
order, those during warm-up, and those of a model that hardly knows more than an untrained one, for which no law of a
reducible loss holds. Every one of them is counted in a sentence.

Units: images are counted, compute is in PFLOP (a total of 1e15 operations, never per second), losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.accounting import BILLION, FLOPS_PER_PFLOP
from training.laws.study_fit import TOTAL, FitConfig

METRICS = ("loss_last", "loss_avg", "error_last", "error_avg")  # of the validation set, Sec. 5.2
LOSSES = METRICS[:2]
RISEN = 0.01  # an end so much above a curve's lowest value is noted


@dataclass(frozen=True)
class TrainedSize:
    """The run of one size with one seed, and what its evaluations have measured."""

    name: str  # of its run folder, such as d6-seed0
    depth: int
    seed: int
    num_parameters: int  # all of them
    eq8_parameters: int  # 18 d w^2, the matrices of the blocks (eq. 8)
    tokens_per_image: int
    flops_per_image: Mapping[str, int]  # by accounting
    images: np.ndarray  # (P,) int64, seen in training before each evaluation, increasing
    metrics: Mapping[str, np.ndarray]  # (P,) float64 for each of METRICS
    is_finished: bool
    planned_images: int = 0  # of the whole run; 0: not known, and the last evaluation counts as the end
    untrained_loss: float = math.inf  # nats, ln V: the loss of a model that knows nothing; infinite: not known

    @property
    def size(self) -> str:
        """The name of the size: d6, of d6-seed0."""
        return self.name.rsplit("-seed", 1)[0]

    def counted(self, counted_parameters: str) -> int:
        """Return the number of parameters, all of them or those of eq. 8."""
        return self.num_parameters if counted_parameters == TOTAL else self.eq8_parameters

    def compute(self, accounting: str) -> np.ndarray:
        """Return the PFLOP spent in training before each evaluation, (P,)."""
        return self.images * (self.flops_per_image[accounting] / FLOPS_PER_PFLOP)

    def final(self, metric: str) -> float:
        """Return the last value measured."""
        return float(self.metrics[metric][-1])


@dataclass(frozen=True)
class SizeCurve:
    """The metrics of one size by images, and at the end of its finished runs."""

    name: str  # d6, of d6-seed0, d6-seed1, ...
    parameters: float  # billions, as the study counts them
    pflop: np.ndarray  # (P,) increasing
    tokens: np.ndarray  # (P,) billions
    metrics: dict[str, np.ndarray]  # (P,) means over seeds
    ends: dict[str, tuple[float, ...]]  # of the finished runs, one a seed; empty tuples without any

    @property
    def is_finished(self) -> bool:
        """The answer whether any run of the size is finished."""
        return all(self.ends.values())

    def end(self, metric: str) -> float:
        """Return the mean of the finished runs."""
        return float(np.mean(self.ends[metric]))


@dataclass(frozen=True)
class StudyCurves:
    """The sizes, smallest first, and sentences on them."""

    sizes: tuple[SizeCurve, ...]
    left_out: tuple[str, ...]  # evaluations that no curve has, with the reasons
    notes: tuple[str, ...]  # what is odd about the rest


def study_curves(runs: Sequence[TrainedSize], config: FitConfig) -> StudyCurves:
    """Make one curve a size."""
    left_out: dict[str, list[str]] = {}  # names by reason
    by_size: dict[str, list[TrainedSize]] = {}
    for run in sorted(runs, key=lambda run: (run.num_parameters, run.seed)):
        usable = _usable(run, left_out)
        if len(usable.images):
            by_size.setdefault(run.size, []).append(usable)
    sizes = [_size_curve(seeds, config, left_out) for seeds in by_size.values()]
    sizes.sort(key=lambda size: size.parameters)
    return StudyCurves(
        sizes=tuple(sizes),
        left_out=tuple(f"{', '.join(names)}: {reason}" for reason, names in left_out.items()),
        notes=tuple(remark for size in sizes for remark in _remarks(size)),
    )


def _usable(run: TrainedSize, left_out: dict[str, list[str]]) -> TrainedSize:
    """Leave out evaluations that are not numbers, or whose images are not more than all before them."""
    values = np.stack([np.asarray(run.metrics[metric], dtype=np.float64) for metric in METRICS])
    is_number = np.all(np.isfinite(values) & (values > 0), axis=0)
    before = np.maximum.accumulate(np.concatenate([[0], run.images]))[:-1]
    kept = is_number & (run.images > before)
    is_finished = bool(run.is_finished and len(kept) and is_number[-1])
    if not kept.all():
        reason = f"{int((~kept).sum())} of {len(kept)} evaluations, not finite, not positive or not in order"
        left_out.setdefault(reason, []).append(run.name)
    if run.is_finished and not is_finished:
        left_out.setdefault("the end, which is no number: counted as unfinished", []).append(run.name)
    metrics = {metric: row[kept] for metric, row in zip(METRICS, values, strict=True)}
    return replace(run, images=np.asarray(run.images)[kept], metrics=metrics, is_finished=is_finished)


def _size_curve(seeds: Sequence[TrainedSize], config: FitConfig, left_out: dict[str, list[str]]) -> SizeCurve:
    """Average the finished seeds at the images where all were evaluated; without any, take the one farthest on."""
    finished = [run for run in seeds if run.is_finished]
    chosen = finished or [max(seeds, key=lambda run: int(run.images[-1]))]
    images = chosen[0].images
    for run in chosen[1:]:
        images = np.intersect1d(images, run.images)
    metrics = {
        metric: np.mean([run.metrics[metric][np.isin(run.images, images)] for run in chosen], axis=0)
        for metric in METRICS
    }
    mean = replace(seeds[0], images=images, metrics=metrics)
    kept = _is_trained(mean, config, left_out)
    images = images[kept]
    return SizeCurve(
        name=mean.size,
        parameters=mean.counted(config.counted_parameters) / BILLION,
        pflop=replace(mean, images=images).compute(config.accounting),
        tokens=images * (mean.tokens_per_image / BILLION),
        metrics={metric: values[kept] for metric, values in metrics.items()},
        ends={metric: tuple(run.final(metric) for run in finished) for metric in METRICS},
    )


def _is_trained(run: TrainedSize, config: FitConfig, left_out: dict[str, list[str]]) -> np.ndarray:
    """Return (P,) True where warm-up is over and both losses are clearly below that of an untrained model."""
    is_warm = run.images >= config.warm_up * (run.planned_images or max(run.images, default=0))
    highest = np.maximum(run.metrics["loss_last"], run.metrics["loss_avg"])
    is_trained = highest <= config.untrained * run.untrained_loss
    if not is_warm.all():
        share = f"in the first {config.warm_up:.3%} of the images"
        left_out.setdefault(f"{int((~is_warm).sum())} of {len(is_warm)} evaluations, {share}", []).append(run.size)
    if untrained := int((is_warm & ~is_trained).sum()):
        reason = (
            f"{untrained} of {len(is_warm)} evaluations, with a loss above {config.untrained:g} of an untrained "
            f"model's {run.untrained_loss:.5g} nats"
        )
        left_out.setdefault(reason, []).append(run.size)
    return is_warm & is_trained


def _remarks(size: SizeCurve) -> list[str]:
    remarks = []
    if not size.is_finished:
        remarks.append(f"{size.name} is not finished: it is in no law of size, and its curve counts as far as it goes.")
    for metric, values in size.metrics.items():
        if len(values) and values[-1] > (1 + RISEN) * values.min():
            remarks.append(
                f"{size.name}: {metric} ends {values[-1] / values.min() - 1:.2%} above its lowest value: it overfits, "
                "or has not settled."
            )
    return remarks
