"""Steps that go wrong are skipped, end the run, or are taken back, as the config says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from training.supervision.divergence import DivergenceConfig, DivergenceGuard, RollBack, TrainingDiverged

NAN, INF = math.nan, math.inf


def record(step: int, loss: float = 2.0, norm: float = 0.5) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": [loss, loss], "loss_avg": loss, "gradient_norm": norm}


def make_guard(*, scales_loss: bool = False, **config: Any) -> DivergenceGuard:
    return DivergenceGuard(DivergenceConfig(**config), scales_loss=scales_loss)


def usual(number: int = 40) -> list[dict[str, Any]]:
    return [record(step, 2.0 + 0.01 * (step % 5)) for step in range(1, number + 1)]


@pytest.mark.parametrize("loss, norm, what", [(NAN, 0.5, "loss"), (INF, 0.5, "loss"), (2.0, INF, "gradient norm")])
def test_a_bad_step_is_skipped_and_counted(loss: float, norm: float, what: str) -> None:
    said = make_guard(max_skips=1).judge(record(7, loss, norm), 0, "rank 1, samples a.tar:3")
    assert said.startswith(f"step 7: the {what} is") and "rank 1, samples a.tar:3" in said and "skipped" in said


def test_a_policy_decides_what_a_bad_step_ends() -> None:
    with pytest.raises(TrainingDiverged, match="step 3: the loss is .*rank 0"):
        make_guard(on_bad_step="stop").judge(record(3, NAN), 0, "rank 0")
    rolling = make_guard(on_bad_step="roll_back")
    with pytest.raises(RollBack, match="step 3: the loss") as caught:
        rolling.judge(record(3, NAN), 64, "rank 0")
    assert caught.value.next_sample == 64
    assert "skipped, 1 in a row" in make_guard(on_bad_step="roll_back").judge(
        record(3, NAN), 64, "rank 0", can_roll_back=False
    )


def test_loss_scaling_may_overflow() -> None:
    assert make_guard(scales_loss=True, on_bad_step="stop").judge(record(1, 2.0, INF), 0, "") == ""
    with pytest.raises(TrainingDiverged):
        make_guard(scales_loss=True, on_bad_step="stop").judge(record(1, NAN), 0, "")


def test_a_spike_is_told_with_both_numbers_and_slow_changes_and_young_runs_have_none() -> None:
    guard = make_guard()
    assert guard.judge(record(1, 9.0), 0, "") == "" and guard.judge(record(2, 900.0), 0, "") == ""
    guard = make_guard()
    assert [guard.judge(each, 0, "") for each in usual()] == [""] * 40
    assert "the loss 20 is far above the 2.02 of the 40 steps before" in guard.judge(record(41, 20.0), 0, "")
    assert [guard.judge(record(42 + n, 2.04 + 0.005 * n), 0, "") for n in range(20)] == [""] * 20
    assert guard.judge(record(62, 0.1), 0, "") == ""
    for policy in ({"on_spike": "roll_back"}, {"spike_deviations": 0}):
        guard = make_guard(**policy)
        guard.remember(usual())
        if "on_spike" not in policy:
            assert guard.judge(record(41, 20.0), 8, "") == ""
            continue
        with pytest.raises(RollBack, match="far above"):
            guard.judge(record(41, 20.0), 8, "")


def test_a_resumed_run_counts_bad_steps_in_a_row_as_an_uninterrupted_one_does() -> None:
    whole, resumed = make_guard(max_skips=2), make_guard(max_skips=2)
    before = [*usual(38), record(39, NAN), record(40), record(41, NAN), record(42, NAN)]
    for each in before:
        whole.judge(each, 0, "")
    stored = [each | {"loss": [None, None], "loss_avg": None} if each["step"] > 40 else each for each in before]
    resumed.remember([*stored, {"kind": "validation", "step": 42, "loss_avg": 9.0}])
    for guard in (whole, resumed):
        with pytest.raises(TrainingDiverged, match="after 2 such steps"):
            guard.judge(record(43, NAN), 0, "")
    whole.remember(before), resumed.remember(stored)
    assert whole.judge(record(43, 2.9), 0, "") == resumed.judge(record(43, 2.9), 0, "") != ""


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("on_bad_step", "ignore", "divergence.on_bad_step is 'ignore'; accepted: skip, stop, roll_back"),
        ("on_spike", "stop", "divergence.on_spike is 'stop'; accepted: warn, roll_back"),
        ("max_skips", -1, "divergence.max_skips is -1"),
        ("spike_window", 3, "divergence.spike_window is 3; it must be at least 20 steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivergenceConfig(**{name: value})
