"""The outer loop in trouble: bad steps, checkpoints that fail, a request to stop, a kill after a roll back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_runs import Run
from torch import Tensor

from training.checkpoints.checkpoint import CheckpointsFailing, TrainState
from training.engine.distributed import World
from training.stage import StepContext
from training.supervision.divergence import DivergenceConfig, TrainingDiverged
from training.supervision.stopping import Stopped, Stopping


def spoil(run: Run, *, losses: dict[int, float]) -> None:
    """Let the stage report another loss at these of its steps, counted from 1."""
    healthy = run.stage.train_step

    def spoiled(batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
        metrics = healthy(batches, context)
        bad = losses.get(len(run.stage.contexts))
        return metrics if bad is None else metrics | {"loss_avg": torch.tensor(bad), "loss": torch.tensor([1.0, bad])}

    run.stage.train_step = spoiled  # type: ignore[method-assign]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_recorded_or_saved(
    tmp_path: Path, bad: float, log_every: int
) -> None:
    run = Run(tmp_path, log_every=log_every, checkpoint_every=2, divergence=DivergenceConfig(on_bad_step="stop"))
    run.loop.name_samples = lambda first: [f"a.tar:{first}"]
    spoil(run, losses={3: bad})
    with pytest.raises(TrainingDiverged, match="step 3: .*rank 0, samples a.tar:16.*step-00000002"):
        run.go()
    assert run.steps("train") == [1, 2] and run.checkpoints.steps == [2]


def test_bad_steps_are_skipped_recorded_and_told(tmp_path: Path) -> None:
    run = Run(tmp_path)
    spoil(run, losses={3: float("nan")})
    run.go()
    assert run.steps("train") == list(range(1, 11))
    assert [entry["loss_avg"] for entry in run.record.read() if entry["step"] == 3] == [None]
    assert [line for line in run.lines if "skipped, 1 in a row" in line]


def test_a_roll_back_takes_the_steps_again_with_the_samples_behind_the_bad_one(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=4, log_every=1, divergence=DivergenceConfig(on_bad_step="roll_back"))
    spoil(run, losses={7: float("nan")})
    state = run.go()
    assert run.stage.batches == [*range(0, 56, 8), *range(56, 104, 8)]  # 4 .. 7 are lost, 8 .. 13 take their place
    assert (state.step, state.samples_seen) == (10, 104)
    assert run.steps("train") == list(range(1, 11)) and run.checkpoints.steps == [4, 8, 10]
    assert [entry["pflop"] for entry in run.record.read() if entry["step"] == 10][0] == pytest.approx(0.08)
    event = run.loop.history.events("roll_back")[0]
    assert (event["to"], event["samples"]) == (4, 24) and "step 7: the loss is" in event["reason"]


def test_without_a_checkpoint_a_bad_step_is_skipped_instead_of_rolled_back(tmp_path: Path) -> None:
    run = Run(tmp_path, log_every=1, divergence=DivergenceConfig(on_bad_step="roll_back"))
    spoil(run, losses={2: float("nan")})
    run.go()
    assert run.stage.batches == list(range(0, 80, 8))


def test_a_roll_back_survives_a_kill(tmp_path: Path) -> None:
    """The samples stepped over do not come back when the run is started again from the same checkpoint."""
    rolling = DivergenceConfig(on_bad_step="roll_back", max_roll_backs=1)
    run = Run(tmp_path, checkpoint_every=4, log_every=1, divergence=rolling)
    spoil(run, losses={7: float("nan")})
    healthy = run.checkpoints.save

    def killed_at_step_8(engines: dict[str, Any], state: TrainState, **facts: Any) -> Path:
        if state.step == 8:
            raise KeyboardInterrupt
        return healthy(engines, state, **facts)

    run.checkpoints.save = killed_at_step_8  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.go()
    again = Run(tmp_path, checkpoint_every=4, log_every=1, divergence=rolling)
    again.go(TrainState(step=4, samples_seen=32))
    assert again.stage.batches == list(range(56, 104, 8))
    third = Run(tmp_path, checkpoint_every=4, log_every=1, divergence=rolling)
    third.checkpoints.steps, third.checkpoints.samples = [4], {4: 32}
    spoil(third, losses={1: float("nan")})
    with pytest.raises(TrainingDiverged, match="after 1 roll backs to step 4"):
        third.go(TrainState(step=4, samples_seen=32))


def test_validations_are_the_same_wherever_a_run_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.supervision.stopping.LOOK_SECONDS", 0.0)
    whole = Run(tmp_path / "whole")
    whole.go()
    for step in range(1, 11):
        run = Run(tmp_path / str(step))
        run.loop.stopping = Stopping(tmp_path / str(step), World())
        healthy = run.stage.train_step

        def asked(batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
            if len(run.stage.contexts) == step - 1:
                (run.record.path.parent / "stop").touch()
            return healthy(batches, context)

        run.stage.train_step = asked  # type: ignore[method-assign]
        with pytest.raises(Stopped):
            run.go()
        run.loop.stopping = None
        run.go(run.checkpoints.resume({}))
        assert run.steps("validation") == whole.steps("validation") == [5, 10], step
        assert run.steps("train") == whole.steps("train"), step


def test_a_history_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=4)
    (tmp_path / "history.jsonl").mkdir()
    run.go()
    assert run.checkpoints.steps == [4, 8, 10] and run.loop.history.saved_step() is None


def test_training_goes_on_when_a_checkpoint_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=2)
    run.checkpoints.failures = 2
    run.go()
    assert run.checkpoints.steps == [6, 8, 10]
    assert len([line for line in run.lines if line.startswith("warning: ") and "training goes on" in line]) == 2


def test_checkpoints_that_fail_again_and_again_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=2, max_failed_saves=3)
    run.checkpoints.failures = 3
    with pytest.raises(CheckpointsFailing, match="step-00000006 is not saved: disk full; 3 in a row failed"):
        run.go()


def test_the_last_checkpoint_must_not_fail(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.failures = 1
    with pytest.raises(CheckpointsFailing, match="step-00000010"):
        run.go()


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.supervision.stopping.LOOK_SECONDS", 0.0)  # these steps are faster than any real one
    run, whole = Run(tmp_path / "run"), Run(tmp_path / "whole")
    run.loop.stopping = Stopping(tmp_path / "run", World())
    healthy = run.stage.train_step

    def asked(batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
        if len(run.stage.contexts) == 3:
            (tmp_path / "run" / "stop").touch()
        return healthy(batches, context)

    run.stage.train_step = asked  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="stop"):
        run.go()
    assert run.checkpoints.steps == [4] and run.steps("train") == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "stop").exists()
    run.loop.stopping = None
    run.go(run.checkpoints.resume({}))
    whole.go()
    assert run.stage.batches == whole.stage.batches and run.steps("train") == whole.steps("train")
