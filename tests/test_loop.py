"""The outer loop: length, rhythm and record of a run, driven with a stage that counts instead of learning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from training import seams
from training.checkpoint import CheckpointFailed, CheckpointsFailing, TrainState
from training.distributed import World
from training.divergence import DivergenceConfig, TrainingDiverged
from training.history import History
from training.loop import Loop
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig, learning_rate_factor
from training.stage import StepContext
from training.stopping import Stopped, Stopping
from training.tracking import Record, RunRecord

NUM_SAMPLES = 40
GLOBAL_BATCH = 8  # 5 steps an epoch


class CountingStage:
    """Reports what it was asked to do."""

    flops_per_image = 10**12
    tokens_per_image = 5

    def __init__(self) -> None:
        self.engines: dict[str, Any] = {}
        self.contexts: list[StepContext] = []
        self.batches: list[int] = []
        self.num_validations = 0

    def train_step(self, batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
        self.contexts.append(context)
        self.batches.append(next(batches))
        loss = torch.tensor(float(len(self.contexts)))
        return {"loss_avg": loss, "loss": torch.stack([loss, 2 * loss]), "gradient_norm": torch.tensor(0.5)}

    def window_metrics(self) -> dict[str, Any]:
        return {"codebook_use": 1.0}

    def validate(self, beat: Callable[[str], None]) -> dict[str, Any]:
        self.num_validations += 1
        return {"loss_avg": 7.0}

    def headline(self, record: Record) -> str:
        return f"loss {record['loss_avg']}"


class RememberedCheckpoints:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.kept: list[int] = []
        self.samples: dict[int, int] = {}
        self.failures = 0  # of the next saves

    def save(self, engines: dict[str, Any], state: TrainState, *, is_kept: bool, notes: dict[str, Any]) -> Path:
        if self.failures:
            self.failures -= 1
            raise CheckpointFailed(f"step-{state.step:08d} is not saved: disk full")
        self.steps.append(state.step)
        self.samples[state.step] = state.samples_seen
        self.kept += [state.step] if is_kept else []
        return self.latest()

    def latest(self) -> Path | None:
        return Path(f"step-{self.steps[-1]:08d}") if self.steps else None

    def resume(self, engines: dict[str, Any]) -> TrainState | None:
        return TrainState(self.steps[-1], self.samples[self.steps[-1]]) if self.steps else None


class Run:
    """A loop, what it drove and what it said."""

    def __init__(self, folder: Path, *, divergence: DivergenceConfig = DivergenceConfig(), **config: Any) -> None:
        self.stage, self.checkpoints, self.lines = CountingStage(), RememberedCheckpoints(), []
        self.record = RunRecord(folder)
        settings = {"global_batch": GLOBAL_BATCH, "epochs": 2.0, "validate_every": 1.0} | config
        self.loop = Loop(
            self.stage,
            LoopConfig(**settings),
            OptimizerConfig(),
            World(),
            NUM_SAMPLES,
            self.record,
            None,
            self.checkpoints,
            self.lines.append,
            History(folder),
            divergence=divergence,
        )

    def go(self, state: TrainState | None = None) -> TrainState:
        return self.loop.run(state or TrainState(), lambda samples_seen: count(samples_seen, GLOBAL_BATCH))

    def steps(self, kind: str) -> list[int]:
        return [entry["step"] for entry in self.record.read() if entry["kind"] == kind]


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_every_step_is_recorded_once_whatever_the_logging_rhythm(tmp_path: Path, log_every: int) -> None:
    run = Run(tmp_path, log_every=log_every)
    run.go()
    assert run.steps("train") == list(range(1, 11))
    assert [entry["loss_avg"] for entry in run.record.read() if entry["kind"] == "train"] == list(range(1, 11))
    assert len([line for line in run.lines if line.startswith("step ")]) == 10


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
    monkeypatch.setattr("training.stopping.LOOK_SECONDS", 0.0)
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
    def full_disk(site: str, value: Any) -> Any:
        if site == "history.write":
            raise OSError(28, "No space left on device")
        return value

    run = Run(tmp_path, checkpoint_every=4)
    seams.install(full_disk)
    try:
        run.go()
    finally:
        seams.install(None)
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
    monkeypatch.setattr("training.stopping.LOOK_SECONDS", 0.0)  # these steps are faster than any real one
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


def test_goodput_is_the_share_of_time_spent_on_surviving_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, log_every=1)
    run.loop.history.note("start")
    state = run.go()
    shares = [entry["goodput"] for entry in run.record.read() if entry["kind"] == "train"]
    assert all(0 < share <= 1 for share in shares) and state.useful_seconds > 0
    later = Run(tmp_path, log_every=1, epochs=3.0)
    later.loop.history.first_start = lambda: time.time() - 1000.0  # type: ignore[method-assign]
    later.go(state)
    assert [entry["goodput"] for entry in later.record.read() if entry["kind"] == "train"][-1] < 0.01


def test_validation_comes_at_its_rhythm_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs=2.4, validate_every=1.0)  # 12 steps, 5 an epoch
    run.go()
    assert run.steps("validation") == [5, 10, 12]


def test_validation_every_half_epoch_rounds_up_to_a_step(tmp_path: Path) -> None:
    run = Run(tmp_path, epochs=1.0, validate_every=0.5)  # 20 samples are 2.5 steps
    run.go()
    assert run.steps("validation") == [3, 5]


def test_validation_by_decades_of_compute_is_the_same_when_resumed(tmp_path: Path) -> None:
    whole, part, rest = (Run(tmp_path / name, epochs=20.0, validate_per_decade=2) for name in ("whole", "part", "rest"))
    whole.go()
    assert whole.steps("validation") == [1, 3, 10, 32, 100]
    part.loop.config = replace(whole.loop.config, stop_after_steps=12)
    rest.go(part.go())
    assert part.steps("validation") + rest.steps("validation") == whole.steps("validation")


def test_checkpoints_come_at_their_rhythm_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=4)
    state = run.go()
    assert run.checkpoints.steps == [4, 8, 10]
    assert (state.step, state.samples_seen) == (10, 80)


def test_what_a_checkpoint_covers_is_recorded_before_it_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=4, log_every=100)
    recorded: list[list[int]] = []
    run.checkpoints.save = lambda engines, state, **facts: recorded.append(run.steps("train"))
    run.go()
    assert recorded == [list(range(1, step + 1)) for step in (4, 8, 10)]


def test_checkpoints_to_keep_come_at_their_shares_of_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint_every=4, keep_at=(0.2, 0.61, 1.0))
    run.go()
    assert run.checkpoints.steps == [2, 4, 6, 8, 10] and run.checkpoints.kept == [2, 6, 10]


def test_an_interrupted_run_keeps_the_same_checkpoints(tmp_path: Path) -> None:
    settings = {"global_batch": GLOBAL_BATCH, "epochs": 2.0, "validate_every": 1.0, "keep_at": (0.1, 0.4, 0.5)}
    part, rest = Run(tmp_path / "part", **settings), Run(tmp_path / "rest", **settings)
    part.loop.config = LoopConfig(**settings, stop_after_steps=4)
    rest.go(part.go())
    assert part.checkpoints.kept == [1, 4] and rest.checkpoints.kept == [5]
    assert part.checkpoints.steps == [1, 4] and rest.checkpoints.steps == [5, 10]


def test_stopping_early_leaves_with_a_checkpoint_and_the_schedule_of_the_whole_run(tmp_path: Path) -> None:
    run = Run(tmp_path, stop_after_steps=3)
    state = run.go()
    assert state.step == 3 and run.checkpoints.steps == [3] and run.steps("train") == [1, 2, 3]
    assert run.stage.num_validations == 0
    assert [context.progress for context in run.stage.contexts] == [0, 0.1, 0.2]


def test_an_interrupted_run_takes_the_same_steps_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, part, rest = (Run(tmp_path / name) for name in ("whole", "part", "rest"))
    part.loop.config = LoopConfig(global_batch=GLOBAL_BATCH, epochs=2.0, validate_every=1.0, stop_after_steps=4)
    whole.go()
    rest.go(part.go())
    assert part.stage.contexts + rest.stage.contexts == whole.stage.contexts
    assert part.stage.batches + rest.stage.batches == whole.stage.batches
    assert part.steps("validation") + rest.steps("validation") == whole.steps("validation")


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    state = Run(tmp_path).go()
    again = Run(tmp_path)
    before = again.record.read()
    again.go(state)
    assert again.stage.contexts == [] and again.checkpoints.steps == [] and again.record.read() == before


def test_each_record_says_where_the_run_stood(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go()
    entry = [entry for entry in run.record.read() if entry["kind"] == "train"][2]
    assert (entry["step"], entry["samples_seen"], entry["epoch"]) == (3, 24, 0.6)
    assert entry["pflop"] == pytest.approx(24 * 10**12 / 10**15)
    assert entry["loss"] == [3.0, 6.0]
    peak = OptimizerConfig().base_lr * GLOBAL_BATCH / 256
    assert entry["learning_rate"] == pytest.approx(peak * learning_rate_factor(0.2, OptimizerConfig()))
    assert 0 <= entry["data_wait_share"] <= 1 and entry["images_per_second"] > 0
    assert entry["tokens_per_second"] == pytest.approx(5 * entry["images_per_second"])


def test_only_rank_zero_writes_the_record(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.loop.world = World(rank=1)  # world_size stays 1: no process group is needed
    run.go()
    assert run.record.read() == []
