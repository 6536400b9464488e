"""The outer loop in trouble: bad steps, checkpoints that fail, a request to stop, a kill after a roll back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_runs import CountedRun
from torch import Tensor

from training.checkpoints.checkpoint import CheckpointsFailing, TrainState
from training.stage import StepContext
from training.supervision.divergence import DivergenceConfig, TrainingDiverged
from training.supervision.stopping import Stopped


def before_each_step(run: CountedRun, act: Callable[[int], dict[str, Tensor] | None]) -> None:
    """Let `act` do something before each step, counted from 1, and name metrics to report instead of the true ones."""
    healthy = run.stage.train_step

    def train_step(batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
        changed = act(len(run.stage.contexts) + 1)
        return healthy(batches, context) | (changed or {})

    run.stage.train_step = train_step


def spoil(run: CountedRun, *, losses: dict[int, float]) -> None:
    """Let the stage report another loss at these of its steps, counted from 1."""

    def bad(step: int) -> dict[str, Tensor]:
        if step not in losses:
            return {}
        return {"loss_avg": torch.tensor(losses[step]), "loss": torch.tensor([1.0, losses[step]])}

    before_each_step(run, bad)


def ask_to_stop(run: CountedRun, *, at_step: int) -> None:
    """Make the file `stop` in the run folder during this step."""
    before_each_step(run, lambda step: (run.run.folder / "stop").touch() if step == at_step else None)


@pytest.fixture
def looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run look for the file `stop` after every step; these are faster than any real one."""
    monkeypatch.setattr("training.supervision.stopping.LOOK_SECONDS", 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_recorded_or_saved(
    tmp_path: Path, bad: float, log_every: int
) -> None:
    stop = DivergenceConfig(on_bad_step="stop")
    run = CountedRun(tmp_path, log_every=log_every, checkpoint_every=2, divergence=stop)
    spoil(run, losses={3: bad})
    with pytest.raises(TrainingDiverged, match=r"step 3: .*rank 0, samples a.tar:16.*step-00000002"):
        run.go()
    assert run.steps() == [1, 2] and run.checkpoints.steps == [2]


@pytest.mark.parametrize("bad", [math.nan, [1.0, math.inf], None])
def test_a_validation_that_is_not_finite_ends_the_run_before_it_is_recorded_or_saved(
    tmp_path: Path, bad: float | list[float] | None
) -> None:
    run = CountedRun(tmp_path)
    run.stage.validate = lambda beat: {"loss_avg": bad}
    with pytest.raises(TrainingDiverged, match="validation loss_avg of step 5 is "):
        run.go()
    assert run.steps("validation") == [] and run.checkpoints.steps == []


def test_bad_steps_are_skipped_recorded_and_told(tmp_path: Path) -> None:
    run = CountedRun(tmp_path)
    spoil(run, losses={3: math.nan})
    run.go()
    assert run.steps() == list(range(1, 11))
    assert run.records()[2]["loss_avg"] is None
    assert [line for line in run.lines if "skipped, 1 in a row" in line]


def test_a_roll_back_takes_the_steps_again_with_the_samples_behind_the_bad_one(tmp_path: Path) -> None:
    roll_back = DivergenceConfig(on_bad_step="roll_back")
    run = CountedRun(tmp_path, checkpoint_every=4, log_every=1, divergence=roll_back)
    spoil(run, losses={7: math.nan})
    state = run.go()
    assert run.stage.batches == [*range(0, 56, 8), *range(56, 104, 8)]  # 4 .. 7 are lost, 8 .. 13 take their place
    assert (state.step, state.samples_seen) == (10, 104)
    assert run.steps() == list(range(1, 11)) and run.checkpoints.steps == [4, 8, 10]
    assert run.records()[-1]["pflop"] == pytest.approx(0.08)
    [event] = run.run.events("roll_back")
    assert (event["to"], event["samples"]) == (4, 24) and "step 7: the loss is" in event["reason"]


def test_without_a_checkpoint_a_bad_step_is_skipped_instead_of_rolled_back(tmp_path: Path) -> None:
    run = CountedRun(tmp_path, log_every=1, divergence=DivergenceConfig(on_bad_step="roll_back"))
    spoil(run, losses={2: math.nan})
    run.go()
    assert run.stage.batches == list(range(0, 80, 8))


def test_a_roll_back_survives_a_kill(tmp_path: Path) -> None:
    """The samples stepped over do not come back when the run is started again from the same checkpoint."""
    rolling = DivergenceConfig(on_bad_step="roll_back", max_roll_backs=1)
    run, again, third = (CountedRun(tmp_path, checkpoint_every=4, log_every=1, divergence=rolling) for _ in range(3))
    spoil(run, losses={7: math.nan})
    healthy = run.checkpoints.save

    def killed_at_step_8(engines: dict[str, Any], state: TrainState, **facts: Any) -> Path:
        if state.step == 8:
            raise KeyboardInterrupt
        return healthy(engines, state, **facts)

    run.checkpoints.save = killed_at_step_8
    with pytest.raises(KeyboardInterrupt):
        run.go()
    again.go(TrainState(step=4, samples_seen=32))
    assert again.stage.batches == list(range(56, 104, 8))
    third.checkpoints.steps, third.checkpoints.samples = [4], {4: 32}
    spoil(third, losses={1: math.nan})
    with pytest.raises(TrainingDiverged, match="after 1 roll backs to step 4"):
        third.go(TrainState(step=4, samples_seen=32))


@pytest.mark.usefixtures("looks_at_every_step")
@pytest.mark.parametrize("step", [1, 4, 5, 10])  # 5 and 10 are followed by a validation
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not_been(tmp_path: Path, step: int) -> None:
    whole, run, rest = CountedRun(tmp_path / "whole"), CountedRun(tmp_path / "run"), CountedRun(tmp_path / "run")
    ask_to_stop(run, at_step=step)
    with pytest.raises(Stopped, match="stop"):
        run.go()
    assert run.checkpoints.steps == [step] and run.steps() == list(range(1, step + 1))
    assert not (tmp_path / "run" / "stop").exists()
    rest.go(run.checkpoints.resume({}))
    whole.go()
    assert run.stage.batches + rest.stage.batches == whole.stage.batches
    assert rest.steps() == whole.steps() and rest.steps("validation") == whole.steps("validation")


def test_a_history_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").mkdir()  # no disk can append to that
    run = CountedRun(tmp_path, checkpoint_every=4)
    run.go()
    assert run.checkpoints.steps == [4, 8, 10]


def test_training_goes_on_when_a_checkpoint_fails(tmp_path: Path) -> None:
    run = CountedRun(tmp_path, checkpoint_every=2)
    run.checkpoints.failures = 2
    run.go()
    assert run.checkpoints.steps == [6, 8, 10]
    assert len([line for line in run.lines if line.startswith("warning: ") and "training goes on" in line]) == 2


@pytest.mark.parametrize(
    "settings, failures, message",
    [
        ({"checkpoint_every": 2, "max_failed_saves": 3}, 3, "step-00000006 is not saved: disk full; 3 in a row failed"),
        ({}, 1, "step-00000010"),  # the last one must not fail
    ],
)
def test_checkpoints_that_keep_failing_end_the_run(
    tmp_path: Path, settings: dict[str, int], failures: int, message: str
) -> None:
    run = CountedRun(tmp_path, **settings)
    run.checkpoints.failures = failures
    with pytest.raises(CheckpointsFailing, match=message):
        run.go()
