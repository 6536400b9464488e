"""One curve a size, of the runs that a study has: seeds averaged, and what no fit can use left out with its reason.

A size is all runs whose names differ in their `-seedN` only. What is left out: evaluations that are not finite or not
in order, those during warm-up, and those of a model that hardly knows more than an untrained one, for which no law of
a reducible loss holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.laws.study_data import METRICS, TrainedSize

BILLION = 1e9
RISEN = 0.01  # an end so much above a curve's lowest value is noted


@dataclass(frozen=True)
class SizeCurve:
    """One size: its metrics by images, and at the end of its finished runs."""

    name: str  # d6, of d6-seed0, d6-seed1, ...
    depth: int
    parameters: float  # billions, as the study counts them
    pflop: np.ndarray  # (P,) increasing
    tokens: np.ndarray  # (P,) billions
    metrics: dict[str, np.ndarray]  # (P,) means over seeds
    ends: dict[str, tuple[float, ...]]  # of the finished runs, one a seed; empty tuples without any

    @property
    def is_finished(self) -> bool:
        return all(self.ends.values())

    def end(self, metric: str) -> float:
        """The mean of the finished runs."""
        return float(np.mean(self.ends[metric]))


@dataclass(frozen=True)
class CurveRules:
    """How runs become curves; see FitConfig for the meaning."""

    accounting: str
    counted_parameters: str
    warm_up: float
    untrained: float


@dataclass(frozen=True)
class StudyCurves:
    """The sizes, smallest first, and sentences on them."""

    sizes: tuple[SizeCurve, ...]
    left_out: tuple[str, ...]  # evaluations that no curve has, with the reasons
    notes: tuple[str, ...]  # what is odd about the rest


def size_name(run: TrainedSize) -> str:
    return run.name.rsplit("-seed", 1)[0]


def study_curves(runs: Sequence[TrainedSize], rules: CurveRules) -> StudyCurves:
    """The curves of a study. Raises ValueError where a run has no operations of the accounting that is asked for."""
    left_out: dict[str, list[str]] = {}
    notes: list[str] = []
    by_size: dict[str, list[TrainedSize]] = {}
    for run in sorted(runs, key=lambda run: (run.num_parameters, run.seed)):
        if rules.accounting not in run.flops_per_image:
            raise ValueError(
                f"{run.name} has no operations per image by {rules.accounting!r}; set fit.accounting to one of "
                f"{', '.join(run.flops_per_image)}"
            )
        usable = _usable(run, left_out)
        if len(usable.images):
            by_size.setdefault(size_name(run), []).append(usable)
    sizes = [_size_curve(name, seeds, rules, left_out) for name, seeds in by_size.items()]
    sizes.sort(key=lambda size: size.parameters)
    for size in sizes:
        notes += _remarks(size)
    sentences = tuple(f"{', '.join(names)}: {reason}" for reason, names in left_out.items())
    return StudyCurves(tuple(sizes), sentences, tuple(notes))


def _usable(run: TrainedSize, left_out: dict[str, list[str]]) -> TrainedSize:
    """The run without evaluations that are not numbers or go back in images."""
    values = np.stack([np.asarray(run.metrics[metric], dtype=np.float64) for metric in METRICS])
    is_number = (np.isfinite(values) & (values > 0)).all(axis=0)
    before = np.concatenate([[0], np.maximum.accumulate(run.images)[:-1]]) if len(run.images) else run.images
    kept = is_number & (run.images > before)
    is_finished = bool(run.is_finished and len(kept) and is_number[-1])
    if not kept.all():
        reason = f"{int((~kept).sum())} of {len(kept)} evaluations, not finite, not positive or not in order"
        left_out.setdefault(reason, []).append(run.name)
    if run.is_finished and not is_finished:
        left_out.setdefault("the end, which is no number: counted as unfinished", []).append(run.name)
    metrics = {metric: row[kept] for metric, row in zip(METRICS, values, strict=True)}
    return replace(run, images=np.asarray(run.images)[kept], metrics=metrics, is_finished=is_finished)


def _size_curve(
    name: str, seeds: Sequence[TrainedSize], rules: CurveRules, left_out: dict[str, list[str]]
) -> SizeCurve:
    """The mean of the finished seeds where all were evaluated; without any, the seed that has come farthest."""
    finished = [run for run in seeds if run.is_finished]
    first = seeds[0]
    chosen = finished or [max(seeds, key=lambda run: int(run.images[-1]))]
    images = chosen[0].images
    for run in chosen[1:]:
        images = np.intersect1d(images, run.images)
    metrics = {
        metric: np.mean([run.metrics[metric][np.isin(run.images, images)] for run in chosen], axis=0)
        for metric in METRICS
    }
    ends = {metric: tuple(run.final(metric) for run in finished) for metric in METRICS}
    kept = _trained(first, images, metrics, rules, left_out)
    images, metrics = images[kept], {metric: values[kept] for metric, values in metrics.items()}
    counted = first.num_parameters if rules.counted_parameters == "total" else first.eq8_parameters
    return SizeCurve(
        name=name,
        depth=first.depth,
        parameters=counted / BILLION,
        pflop=replace(first, images=images).compute(rules.accounting),
        tokens=images * (first.tokens_per_image / BILLION),
        metrics=metrics,
        ends=ends,
    )


def _trained(
    run: TrainedSize,
    images: np.ndarray,
    metrics: dict[str, np.ndarray],
    rules: CurveRules,
    left_out: dict[str, list[str]],
) -> np.ndarray:
    """(P,) True where warm-up is over and both losses are clearly below that of an untrained model."""
    name, untrained_loss = size_name(run), run.untrained_loss
    is_warm = images >= rules.warm_up * (run.planned_images or max(images, default=0))
    highest = np.maximum(metrics["loss_last"], metrics["loss_avg"])
    is_trained = highest <= rules.untrained * untrained_loss
    if not is_warm.all():
        reason = f"{int((~is_warm).sum())} of {len(images)} evaluations, in the first {rules.warm_up:.3%} of the images"
        left_out.setdefault(reason, []).append(name)
    if (is_warm & ~is_trained).any():
        reason = (
            f"{int((is_warm & ~is_trained).sum())} of {len(images)} evaluations, with a loss above "
            f"{rules.untrained:g} of an untrained model's {untrained_loss:.5g} nats"
        )
        left_out.setdefault(reason, []).append(name)
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
