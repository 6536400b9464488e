"""The length of a run follows from its epochs, and settings that make no sense are refused by name."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from training.loop_config import LoopConfig


@pytest.mark.parametrize(
    "epochs, num_samples, steps",
    [(200, 1_281_167, 333_638), (1, 8, 1), (1, 9, 2), (0.5, 16, 1), (0.001, 8, 1)],
)
def test_a_run_has_enough_steps_for_its_epochs(epochs: float, num_samples: int, steps: int) -> None:
    global_batch = 768 if num_samples > 1000 else 8  # 200 epochs of ImageNet at 768 are 333,637.2 steps
    assert LoopConfig(global_batch=global_batch, epochs=epochs).total_steps(num_samples) == steps


RHYTHMS = ("global_batch", "epochs", "log_every", "validate_every", "checkpoint_every", "keep_checkpoints")


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, 0) for name in (*RHYTHMS, "max_failed_saves")),
        *((name, -1) for name in ("stop_after_steps", "keep_every")),
        *(("validate_per_decade", rate) for rate in (-1.0, 101.0, math.nan)),
        *(("keep_at", (0.5, share)) for share in (0.0, -0.2, 1.01, math.nan)),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"loop.{name} (is|has) {value[-1] if isinstance(value, tuple) else value};"):
        LoopConfig(**{name: value})


def due(config: LoopConfig, total_steps: int) -> list[int]:
    steps = range(1, total_steps + 1)
    return [step for step in steps if config.validation_is_due(step, total_steps=total_steps, num_samples=1000)]


@pytest.mark.parametrize("per_decade", [3.0, 4.5, 8.0])
@pytest.mark.parametrize("total_steps", [20_000, 33_337])
def test_evaluations_by_decades_are_evenly_spaced_in_log_compute(per_decade: float, total_steps: int) -> None:
    steps = due(LoopConfig(validate_per_decade=per_decade), total_steps)
    gaps = [math.log10(later / earlier) for earlier, later in pairwise(steps)]
    assert gaps == pytest.approx([1 / per_decade] * len(gaps), rel=0.1)  # whole steps: the first are the roughest
    assert steps[-1] == total_steps and len(steps) == math.floor(3 * per_decade) + 1
    assert 1e-3 * total_steps - 0.5 <= steps[0] < 1e-3 * total_steps * 10 ** (1 / per_decade) + 0.5


@pytest.mark.parametrize("total_steps", [1, 2, 7, 100])
def test_a_short_run_is_evaluated_from_its_first_step_to_its_last(total_steps: int) -> None:
    steps = due(LoopConfig(validate_per_decade=8), total_steps)
    assert steps[0] == 1 and steps[-1] == total_steps and len(set(steps)) == len(steps)


def test_evaluations_by_decades_take_the_place_of_those_by_epochs() -> None:
    by_epochs = LoopConfig(global_batch=10, validate_every=0.1)
    assert due(by_epochs, 100) == list(range(10, 101, 10))
    both = LoopConfig(global_batch=10, validate_every=0.1, validate_per_decade=1)
    assert due(both, 100) == [1, 10, 100]
