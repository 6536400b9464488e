"""The best size for a budget, by planted laws L(N, D) whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from training.accounting import BILLION, FLOPS_PER_PFLOP
from training.laws.allocation import Allocation, Size, allocate, pflop_of_gpu_days, study_range
from training.laws.study_data import METRICS, TrainedSize
from training.laws.study_fit import EQ8, TOTAL, Interval, ParametricFit

EVERYWHERE = {name: Interval(0, 1e18) for name in ("parameters", "tokens", "compute")}
TRUTH = (5.0, 1.0, 0.3, 2.0, 0.3)  # E, A, a, B, b


def size(depth: int) -> Size:
    """18 d w^2 matrices, a tenth more parameters, and 6 N T operations an image of 680 tokens."""
    matrices = 73_728 * depth**3
    total = round(1.1 * matrices)
    return Size(depth, total, total, tokens_per_image=680, flops_per_image=6 * 680 * total)


def law(*truth: float, draws: tuple[tuple[float, ...], ...] = ()) -> ParametricFit:
    a, b = truth[2], truth[4]
    return ParametricFit("loss_avg", *truth, a * b / (a + b), draws or (truth,), 100, 1.0)


def ask(
    fit: ParametricFit,
    pflop: float,
    depths: Sequence[int] = tuple(range(1, 41)),
    study: Mapping[str, Interval] = EVERYWHERE,
) -> Allocation:
    return allocate(fit, pflop, [size(depth) for depth in depths], study=study, images_per_epoch=1_281_167)


def run(depth: int) -> TrainedSize:
    return TrainedSize(
        name=f"d{depth}-seed0",
        depth=depth,
        seed=0,
        num_parameters=size(depth).num_parameters,
        eq8_parameters=73_728 * depth**3,
        tokens_per_image=680,
        flops_per_image={"exact": size(depth).flops_per_image},
        images=np.asarray([1000, 200_000]),
        metrics={name: np.ones(2) for name in METRICS},
        is_finished=True,
    )


def test_every_size_spends_the_whole_budget_and_is_predicted_by_the_law() -> None:
    irreducible, a_factor, a, b_factor, b = TRUTH
    for candidate in ask(law(*TRUTH), 1e4).candidates:
        cost = size(candidate.depth).flops_per_image / FLOPS_PER_PFLOP
        assert candidate.images * cost <= 1e4 < (candidate.images + 1) * cost
        assert candidate.tokens == candidate.images * 680
        assert candidate.epochs == candidate.images / 1_281_167
        n, d = candidate.num_parameters / BILLION, candidate.tokens / BILLION
        assert candidate.loss == pytest.approx(irreducible + a_factor * n**-a + b_factor * d**-b)


def test_the_best_size_has_the_smallest_loss_and_grows_with_the_budget_as_theory_says() -> None:
    """N ~ C^(b / (a + b)) (Hoffmann et al. 2022, eq. 4), here C^0.5."""
    found = [ask(law(*TRUTH), pflop, range(4, 61)) for pflop in (1e4, 1e5, 1e6)]
    for allocation in found:
        assert allocation.best.loss == min(candidate.loss for candidate in allocation.candidates)
        assert allocation.notes == ()
    sizes = [allocation.best.num_parameters for allocation in found]
    assert np.diff(np.log10(sizes)) == pytest.approx([0.5, 0.5], abs=0.1)


@pytest.mark.parametrize(
    ("truth", "best", "note"),
    [((5.0, 1e-9, 0.3, 2.0, 0.3), 6, "d6 is the smallest"), ((5.0, 1.0, 0.3, 1e-9, 0.3), 10, "a larger one may be")],
)
def test_a_best_size_at_the_edge_is_noted(truth: tuple[float, ...], best: int, note: str) -> None:
    allocation = ask(law(*truth), 1e4, (6, 8, 10))
    assert allocation.best.depth == best and note in allocation.notes[0]
    assert ask(law(*truth), 1e4, (8,)).notes == (), "one size alone has no edge"


def test_intervals_are_those_of_the_draws() -> None:
    rng = np.random.default_rng(0)
    draws = tuple(tuple(row) for row in np.array(TRUTH) * rng.normal(1, 0.02, (400, 5)))
    allocation = ask(law(*TRUTH, draws=draws), 1e5)
    best = allocation.best
    assert sum(candidate.share_of_draws for candidate in allocation.candidates) == pytest.approx(1)
    assert len(allocation.winners) > 1 and "bootstrap draws" in allocation.notes[-1]
    assert {ask(law(*draw), 1e5).best.depth for draw in draws[:40]} <= set(allocation.winners)
    low, high = allocation.interval
    assert allocation.winners[0] <= low <= best.depth <= high <= allocation.winners[-1]
    assert sum(c.share_of_draws for c in allocation.candidates if not low <= c.depth <= high) <= 0.05
    losses = [float(law(*draw)(best.num_parameters / BILLION, best.tokens / BILLION)) for draw in draws]
    inside = np.mean([best.interval.low <= loss <= best.interval.high for loss in losses])
    assert inside == pytest.approx(0.95, abs=0.01)


def test_a_study_spans_its_evaluations() -> None:
    study = study_range([run(6), run(8)], counted_parameters=TOTAL)
    small, large = size(6), size(8)
    assert study["parameters"] == Interval(small.num_parameters / BILLION, large.num_parameters / BILLION)
    assert study["tokens"] == Interval(680_000 / BILLION, 136_000_000 / BILLION)
    assert study["compute"].low == pytest.approx(1000 * small.flops_per_image / FLOPS_PER_PFLOP)
    assert study["compute"].high == pytest.approx(200_000 * large.flops_per_image / FLOPS_PER_PFLOP)
    assert study_range([run(8)], counted_parameters=EQ8)["parameters"].low == 73_728 * 8**3 / BILLION


def test_the_law_is_asked_about_the_parameters_that_it_counts() -> None:
    fewer = replace(size(8), counted=73_728 * 8**3)
    eq8 = allocate(law(*TRUTH), 1e4, [fewer], study=EVERYWHERE, images_per_epoch=1).best
    assert eq8.num_parameters == size(8).num_parameters, "what is shown is the total, whatever the law counts"
    assert eq8.loss > ask(law(*TRUTH), 1e4, (8,)).best.loss


def test_what_lies_outside_the_study_is_flagged() -> None:
    study = study_range([run(6), run(8), run(10)], counted_parameters=TOTAL)
    inside = study["compute"].high * 0.5
    assert ask(law(*TRUTH), inside, (8, 10), study).candidates[1].beyond == ()
    assert ask(law(*TRUTH), inside, (12,), study).best.beyond == ("parameters",)
    allocation = ask(law(*TRUTH), study["compute"].high * 100, (6, 12), study)
    assert allocation.candidates[0].beyond == ("tokens", "compute")
    assert "extrapolation" in allocation.notes[0] and "PFLOP" in allocation.notes[0]


def test_a_size_is_left_out_if_the_budget_does_not_buy_one_image_of_it() -> None:
    cost = size(8).flops_per_image / FLOPS_PER_PFLOP
    assert [c.depth for c in ask(law(*TRUTH), cost * 1.001, (6, 8, 10)).candidates] == [6, 8]
    with pytest.raises(ValueError, match="do not pay for one image of the smallest size, d8"):
        ask(law(*TRUTH), cost * 0.9, (8, 10))


@pytest.mark.parametrize(
    ("days", "tflops", "utilisation", "message"),
    [
        (0, 989, 0.4, "gpu_days 0"),
        (1, 989, 0, "utilisation 0"),
        (1, 989, 40, "at most 1"),
    ],
)
def test_impossible_gpu_days_are_refused(days: float, tflops: float, utilisation: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pflop_of_gpu_days(days, tflops=tflops, utilisation=utilisation)
