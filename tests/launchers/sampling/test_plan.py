"""launchers/sampling/plan.py: every image belongs to one unit, and has a seed that no other image ever has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from launchers.sampling.plan import MAX_CLASSES, MAX_PER_CLASS, MAX_SEEDS, SamplePlan, plan_samples

SETTINGS = {"per_class": 2, "batch": 4, "seed": 0}


def every_image(plan: SamplePlan) -> np.ndarray:
    return np.arange(plan.num_images)


def test_images_come_class_by_class_and_are_numbered_within_it() -> None:
    plan = plan_samples((2, 0), 3, **SETTINGS)
    assert plan.labels(every_image(plan)).tolist() == [2, 2, 0, 0]
    assert plan.numbers(every_image(plan)).tolist() == [0, 1, 0, 1]
    assert plan_samples((), 3, **SETTINGS).classes == (0, 1, 2)


def test_a_model_without_classes_has_the_one_class_0() -> None:
    plan = plan_samples((), 0, per_class=7, batch=4, seed=0)
    assert plan.num_images == 7 and set(plan.labels(every_image(plan)).tolist()) == {0}
    with pytest.raises(ValueError, match="unconditional, so leave classes out"):
        plan_samples((0,), 0, **SETTINGS)


@pytest.mark.parametrize("batch", [1, 4, 7, 50])
def test_units_hold_every_image_once(batch: int) -> None:
    plan = SamplePlan(classes=(3, 1, 2), per_class=5, batch=batch)
    units = [plan.unit(number) for number in range(plan.num_units)]
    assert np.concatenate(units).tolist() == list(range(15))
    assert all(len(unit) == plan.batch for unit in units[:-1])


def test_a_batch_is_not_wider_than_the_job() -> None:
    assert SamplePlan(classes=(207,), per_class=16, batch=50).batch == 16


def test_the_seed_of_an_image_depends_on_seed_class_and_number_alone() -> None:
    many = SamplePlan(classes=tuple(range(10)), per_class=50, batch=7, seed=3)
    few = SamplePlan(classes=(8, 4), per_class=2, batch=1, seed=3)
    assert few.seeds(every_image(few)).tolist() == many.seeds(np.array([400, 401, 200, 201])).tolist()


def test_no_two_images_share_a_seed() -> None:
    plans = [SamplePlan(classes=tuple(range(1000)), per_class=50, batch=50, seed=seed) for seed in (0, 1, 2)]
    seeds = np.concatenate([plan.seeds(every_image(plan)) for plan in plans])
    assert len(np.unique(seeds)) == 150_000


def test_seeds_fill_the_63_bits_and_no_more() -> None:
    """The greatest (seed, class, number) has the greatest seed; the three are like digits of one number."""
    last = SamplePlan(classes=(MAX_CLASSES - 1,), per_class=MAX_PER_CLASS, batch=50, seed=MAX_SEEDS - 1)
    assert last.seeds(np.array([MAX_PER_CLASS - 1])).tolist() == [2**63 - 1]
    end_of_class = SamplePlan(classes=(0, 1), per_class=MAX_PER_CLASS, batch=50)
    assert np.diff(end_of_class.seeds(np.array([MAX_PER_CLASS - 1, MAX_PER_CLASS]))).tolist() == [1]
    next_seed = SamplePlan(classes=(0,), per_class=1, batch=1, seed=1).seeds(np.array([0]))[0]
    end_of_seed = SamplePlan(classes=(MAX_CLASSES - 1,), per_class=MAX_PER_CLASS, batch=50)
    assert end_of_seed.seeds(np.array([MAX_PER_CLASS - 1]))[0] + 1 == next_seed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_class": 0}, "per_class is 0; accepted: 1 to 1048576"),
        ({"per_class": 2**20 + 1}, "per_class is 1048577"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1; accepted: 0 to 134217727"),
        ({"seed": 2**27}, "seed is 134217728"),
        ({"classes": (0, -1)}, "classes has -1; this model knows 0 to 2"),
        ({"classes": (3,)}, "classes has 3; this model knows 0 to 2"),
        ({"classes": (1, 2, 1)}, "names one twice"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_samples(num_classes=3, **({"classes": (), **SETTINGS} | change))


def test_a_model_of_more_classes_than_there_are_seeds_for_is_refused() -> None:
    with pytest.raises(ValueError, match="classes go up to 65536; accepted: 0 to 65535"):
        plan_samples((), MAX_CLASSES + 1, **SETTINGS)
