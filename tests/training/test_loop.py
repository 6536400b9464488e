"""The outer loop: length, rhythm and record of a run, driven with a stage that counts instead of learning."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from counted_runs import GLOBAL_BATCH, Run

from training.engine.distributed import World
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig, learning_rate_factor


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_every_step_is_recorded_once_whatever_the_logging_rhythm(tmp_path: Path, log_every: int) -> None:
    run = Run(tmp_path, log_every=log_every)
    run.go()
    assert run.steps("train") == list(range(1, 11))
    assert [entry["loss_avg"] for entry in run.record.read() if entry["kind"] == "train"] == list(range(1, 11))
    assert len([line for line in run.lines if line.startswith("step ")]) == 10


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
