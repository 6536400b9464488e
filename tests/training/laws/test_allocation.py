"""The best size for a budget, by planted laws L(N, D) whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from models.var import VARConfig
from training.flops import FLOPS_PER_PFLOP, eq8_parameters, flops_per_image, training_flops
from training.laws.allocation import (
    ALL_DEPTHS,
    BILLION,
    EQ8,
    Allocation,
    StudyRange,
    allocate,
    pflop_of_gpu_days,
    study_range,
)
from training.laws.study_data import METRICS, TrainedSize
from training.laws.study_fit import Interval, ParametricFit

TEMPLATE = VARConfig(depth=16)
EVERYWHERE = StudyRange(Interval(0, 1e9), Interval(0, 1e12), Interval(0, 1e15))
TRUTH = (5.0, 1.0, 0.3, 2.0, 0.3)  # E, A, a, B, b


def law(*truth: float, draws: tuple[tuple[float, ...], ...] = ()) -> ParametricFit:
    irreducible, a_factor, a, b_factor, b = truth
    return ParametricFit(
        metric="loss_avg",
        irreducible=irreducible,
        parameter_factor=a_factor,
        parameter_exponent=a,
        token_factor=b_factor,
        token_exponent=b,
        compute_exponent=a * b / (a + b),
        draws=draws or (truth,),
        num_points=100,
        r_squared=1.0,
    )


def ask(
    fit: ParametricFit, pflop: float, *, depths: tuple[int, ...] = (), study: StudyRange = EVERYWHERE
) -> Allocation:
    return allocate(fit, pflop, template=TEMPLATE, depths=depths, study=study, images_per_epoch=1_281_167)


def run(depth: int, *, images: tuple[int, ...] = (1000, 200_000)) -> TrainedSize:
    config = VARConfig(depth=depth)
    return TrainedSize(
        name=f"d{depth}-seed0",
        depth=depth,
        seed=0,
        num_parameters=config.num_parameters,
        eq8_parameters=eq8_parameters(config),
        tokens_per_image=config.scales.num_tokens,
        flops_per_image=flops_per_image(config),
        images=np.array(images, dtype=np.int64),
        metrics={name: np.ones(len(images)) for name in METRICS},
        is_finished=True,
    )


def test_every_size_spends_the_whole_budget() -> None:
    for candidate in ask(law(*TRUTH), 1e4).candidates:
        cost = training_flops(replace(TEMPLATE, depth=candidate.depth)) / FLOPS_PER_PFLOP
        assert candidate.images * cost <= 1e4 < (candidate.images + 1) * cost
        assert candidate.tokens == candidate.images * 680
        assert candidate.epochs == candidate.images / 1_281_167


def test_predictions_are_the_law_at_that_size_and_those_tokens() -> None:
    irreducible, a_factor, a, b_factor, b = TRUTH
    for candidate in ask(law(*TRUTH), 1e4).candidates:
        n, d = candidate.num_parameters / BILLION, candidate.tokens / BILLION
        assert candidate.loss == pytest.approx(irreducible + a_factor * n**-a + b_factor * d**-b)


def test_no_other_size_is_better_than_the_best() -> None:
    allocation = ask(law(*TRUTH), 1e5)
    assert allocation.best.depth not in (ALL_DEPTHS[0], ALL_DEPTHS[-1])  # or the optimum would not be inside
    assert allocation.best.loss == min(candidate.loss for candidate in allocation.candidates)
    assert allocation.notes == ()


def test_the_best_size_grows_with_the_budget_as_theory_says() -> None:
    # N ~ C^(b / (a + b)) (Hoffmann et al. 2022, eq. 4), here C^0.5; cost per token is not quite proportional to N
    depths = tuple(range(4, 61))
    sizes = [ask(law(*TRUTH), pflop, depths=depths).best.num_parameters for pflop in (1e4, 1e5, 1e6)]
    assert np.diff(np.log10(sizes)) == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_law_without_gain_from_size_chooses_the_smallest_and_says_that_it_is_at_the_edge() -> None:
    allocation = ask(law(5.0, 1e-9, 0.3, 2.0, 0.3), 1e4, depths=(6, 8, 10))
    assert allocation.best.depth == 6 and "smallest" in allocation.notes[0]


def test_a_law_without_gain_from_data_chooses_the_largest() -> None:
    allocation = ask(law(5.0, 1.0, 0.3, 1e-9, 0.3), 1e4, depths=(6, 8, 10))
    assert allocation.best.depth == 10 and "larger one" in allocation.notes[0]


def test_one_size_is_at_no_edge() -> None:
    assert ask(law(*TRUTH), 1e4, depths=(8,)).notes == ()


def test_without_scatter_the_interval_is_the_prediction() -> None:
    allocation = ask(law(*TRUTH, draws=(TRUTH,) * 5), 1e5)
    assert allocation.winners == (allocation.best.depth,)
    assert allocation.interval == (allocation.best.depth, allocation.best.depth)
    for candidate in allocation.candidates:
        assert candidate.interval.low == pytest.approx(candidate.loss) == candidate.interval.high


def test_intervals_are_those_of_the_draws() -> None:
    rng = np.random.default_rng(0)
    draws = tuple(tuple(row) for row in np.array(TRUTH) * rng.normal(1, 0.02, (400, 5)))
    allocation = ask(law(*TRUTH, draws=draws), 1e5)
    assert sum(candidate.share_of_draws for candidate in allocation.candidates) == pytest.approx(1)
    assert len(allocation.winners) > 1 and "bootstrap draws" in allocation.notes[-1]
    best = [ask(law(*draw), 1e5).best.depth for draw in draws[:40]]  # draw by draw
    assert set(best) <= set(allocation.winners)
    low, high = allocation.interval
    assert allocation.winners[0] <= low <= allocation.best.depth <= high <= allocation.winners[-1]
    outside = sum(c.share_of_draws for c in allocation.candidates if not low <= c.depth <= high)
    assert outside <= 0.05
    losses = [
        float(law(*draw)(allocation.best.num_parameters / BILLION, allocation.best.tokens / BILLION)) for draw in draws
    ]
    inside = np.mean([allocation.best.interval.low <= loss <= allocation.best.interval.high for loss in losses])
    assert inside == pytest.approx(0.95, abs=0.01)


def test_a_study_spans_its_evaluations() -> None:
    study = study_range([run(6), run(8)])
    assert study.billions == Interval(18_492_580 / BILLION, 41_315_904 / BILLION)
    assert study.billion_tokens == Interval(680_000 / BILLION, 136_000_000 / BILLION)
    assert study.pflop.low == pytest.approx(1000 * training_flops(VARConfig(depth=6)) / FLOPS_PER_PFLOP)
    assert study.pflop.high == pytest.approx(200_000 * training_flops(VARConfig(depth=8)) / FLOPS_PER_PFLOP)


def test_parameters_are_counted_as_the_law_counts_them() -> None:
    study = study_range([run(6), run(8)], counted_parameters=EQ8)
    assert study.billions.high == 73_728 * 8**3 / BILLION == study.count(VARConfig(depth=8))
    eq8 = ask(law(*TRUTH), 1e4, depths=(8,), study=study).best
    assert eq8.num_parameters == 41_315_904  # what is shown is the total, whatever the law counts
    assert eq8.loss > ask(law(*TRUTH), 1e4, depths=(8,)).best.loss  # fewer parameters are counted


def test_what_lies_outside_the_study_is_flagged() -> None:
    study = study_range([run(6), run(8), run(10)])
    inside = study.pflop.high * 0.5
    assert ask(law(*TRUTH), inside, depths=(8, 10), study=study).candidates[1].beyond == ()
    assert ask(law(*TRUTH), inside, depths=(12,), study=study).best.beyond == ("parameters",)
    allocation = ask(law(*TRUTH), study.pflop.high * 100, depths=(6, 12), study=study)
    assert allocation.candidates[0].beyond == ("tokens", "compute")
    assert "extrapolation" in allocation.notes[0] and "PFLOP" in allocation.notes[0]


def test_sizes_that_the_budget_does_not_buy_an_image_of_are_left_out() -> None:
    cost = training_flops(VARConfig(depth=8)) / FLOPS_PER_PFLOP
    assert [c.depth for c in ask(law(*TRUTH), cost * 1.001, depths=(10, 8, 6)).candidates] == [6, 8]
    with pytest.raises(ValueError, match="do not pay for one image of the smallest size, d8"):
        ask(law(*TRUTH), cost * 0.9, depths=(10, 8))


def test_gpu_days() -> None:
    # 1e15 operations a second for a day, half of them reached
    assert pflop_of_gpu_days(1, tflops=1000, utilisation=0.5) == pytest.approx(43_200)


@pytest.mark.parametrize(
    "days, tflops, utilisation, message",
    [
        (0, 989, 0.4, "gpu_days 0"),
        (1, -1, 0.4, "gpu_tflops -1"),
        (1, 989, 0, "utilisation 0"),
        (1, 989, 40, "at most 1"),
    ],
)
def test_impossible_gpu_days_are_refused(days: float, tflops: float, utilisation: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pflop_of_gpu_days(days, tflops=tflops, utilisation=utilisation)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="budget is 0"):
        ask(law(*TRUTH), 0)
    with pytest.raises(ValueError, match="no bootstrap draws"):
        ask(replace(law(*TRUTH), draws=()), 1e4)
    with pytest.raises(ValueError, match="images_per_epoch 0"):
        allocate(law(*TRUTH), 1e4, template=TEMPLATE, depths=(), study=EVERYWHERE, images_per_epoch=0)
    with pytest.raises(ValueError, match="no run of the study"):
        study_range([run(6, images=())])
    with pytest.raises(ValueError, match="counted_parameters is 'all'"):
        study_range([run(6)], counted_parameters="all")
    with pytest.raises(ValueError, match="depth 0"):
        ask(law(*TRUTH), 1e4, depths=(0,))
