"""The outer loop: length, rhythm and record of a run, driven with a stage that counts instead of learning."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from counted_runs import GLOBAL_BATCH, CountedRun
from torch import Tensor

from training.checkpoints.checkpoint import CheckpointsFailing
from training.engine.distributed import World
from training.optim import OptimizerConfig, learning_rate_factor
from training.run import Run, RunFolderGone
from training.stage import StepContext
from training.supervision.divergence import DivergenceConfig
from training.supervision.history import LOST_OUTPUT
from training.tracking import record as record_module
from training.tracking.record import Record
from training.tracking.redaction import RedactingStream


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_every_step_is_recorded_once_whatever_the_logging_rhythm(tmp_path: Path, log_every: int) -> None:
    run = CountedRun(tmp_path, log_every=log_every)
    run.go()
    assert run.steps() == [record["loss_avg"] for record in run.records()] == list(range(1, 11))
    assert len([line for line in run.lines if line.startswith("step ")]) == 10


def test_goodput_is_the_share_of_time_spent_on_surviving_steps(tmp_path: Path) -> None:
    run = CountedRun(tmp_path, log_every=1)
    state = run.go()
    assert all(0 < record["goodput"] <= 1 for record in run.records()) and state.useful_seconds > 0
    later = CountedRun(tmp_path, log_every=1, epochs=3.0)
    later.run.first_start = time.time() - 1000.0
    later.go(state)
    assert later.records()[-1]["goodput"] < 0.01


@pytest.mark.parametrize(
    "settings, steps",  # of which there are 5 an epoch
    [
        ({"epochs": 2.4, "validate_every": 1.0}, [5, 10, 12]),
        ({"epochs": 1.0, "validate_every": 0.5}, [3, 5]),  # every 2.5 steps, rounded up
        ({"epochs": 20.0, "validate_per_decade": 2}, [1, 3, 10, 32, 100]),
    ],
)
def test_validation_comes_at_its_rhythm_and_at_the_end(
    tmp_path: Path, settings: dict[str, float], steps: list[int]
) -> None:
    run = CountedRun(tmp_path, **settings)
    run.go()
    assert run.steps("validation") == steps


@pytest.mark.parametrize(
    "keep_at, saved, kept", [((), [4, 8, 10], []), ((0.2, 0.61, 1.0), [2, 4, 6, 8, 10], [2, 6, 10])]
)
def test_checkpoints_come_at_their_rhythm_at_the_shares_to_keep_and_at_the_end(
    tmp_path: Path, keep_at: tuple[float, ...], saved: list[int], kept: list[int]
) -> None:
    run = CountedRun(tmp_path, checkpoint_every=4, keep_at=keep_at)
    state = run.go()
    assert (run.checkpoints.steps, run.checkpoints.kept) == (saved, kept)
    assert (state.step, state.samples_seen) == (10, 80)


def test_what_a_checkpoint_covers_is_recorded_before_it_is_saved(tmp_path: Path) -> None:
    run = CountedRun(tmp_path, checkpoint_every=4, log_every=100)
    recorded: list[list[int]] = []
    run.checkpoints.save = lambda engines, state, **facts: recorded.append(run.steps())
    run.go()
    assert recorded == [list(range(1, step + 1)) for step in (4, 8, 10)]


@pytest.mark.parametrize(
    "settings", [{"keep_at": (0.1, 0.4, 0.5)}, {"epochs": 20.0, "validate_per_decade": 2, "keep_at": (0.01,)}]
)
def test_an_interrupted_run_does_what_an_uninterrupted_one_does(
    tmp_path: Path, settings: dict[str, float | tuple[float, ...]]
) -> None:
    whole, rest = (CountedRun(tmp_path / name, **settings) for name in ("whole", "rest"))
    part = CountedRun(tmp_path / "part", stop_after_steps=4, **settings)
    whole.go()
    assert rest.go(part.go()).step == whole.schedule.total_steps
    assert part.checkpoints.steps[-1] == part.steps()[-1] == 4
    assert part.stage.contexts + rest.stage.contexts == whole.stage.contexts
    assert part.stage.batches + rest.stage.batches == whole.stage.batches
    assert part.steps("validation") + rest.steps("validation") == whole.steps("validation")
    assert part.checkpoints.kept + rest.checkpoints.kept == whole.checkpoints.kept


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    state = CountedRun(tmp_path).go()
    again = CountedRun(tmp_path)
    before = again.run.record.read()
    again.go(state)
    assert again.stage.contexts == [] and again.checkpoints.steps == [] and again.run.record.read() == before


def test_each_record_says_where_the_run_stood(tmp_path: Path) -> None:
    run = CountedRun(tmp_path)
    run.go()
    record = run.records()[2]
    assert (record["step"], record["samples_seen"], record["epoch"]) == (3, 24, 0.6)
    assert record["pflop"] == pytest.approx(24 * 10**12 / 10**15)
    assert record["loss"] == [3.0, 6.0]
    peak = OptimizerConfig().base_lr * GLOBAL_BATCH / 256
    assert record["learning_rate"] == pytest.approx(peak * learning_rate_factor(0.2, OptimizerConfig()))
    assert 0 <= record["data_wait_share"] <= 1 and record["images_per_second"] > 0
    assert record["tokens_per_second"] == pytest.approx(5 * record["images_per_second"])


def test_only_rank_zero_writes_the_record(tmp_path: Path) -> None:
    run = CountedRun(tmp_path, world=World(rank=1))  # world_size stays 1: no process group is needed
    run.go()
    assert run.run.record.read() == []


def start(run: CountedRun) -> None:
    run.run.resume({}, config_yaml="", init_from="")


def test_no_checkpoint_covers_what_the_disk_did_not_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records wait in memory while the disk refuses them; checkpoints wait too, and the run's end is no success."""
    run = CountedRun(tmp_path, checkpoint_every=2)
    append = record_module.append_lines

    def refusing(path: Path, records: list[Record]) -> None:
        if path.name == "metrics.jsonl" and records[-1]["step"] > 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        append(path, records)

    monkeypatch.setattr(record_module, "append_lines", refusing)
    with pytest.raises(CheckpointsFailing, match="step 10 is not saved, its records are not on disk"):
        run.go()
    assert run.checkpoints.steps == [2, 4] == run.steps()[1::2]


def test_a_disk_that_comes_back_gets_every_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, append = CountedRun(tmp_path, checkpoint_every=2), record_module.append_lines

    def refusing(path: Path, records: list[Record]) -> None:
        if path.name == "metrics.jsonl" and 4 < records[-1]["step"] < 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        append(path, records)

    monkeypatch.setattr(record_module, "append_lines", refusing)
    run.go()
    assert run.steps() == list(range(1, 11)) and run.checkpoints.steps == [2, 4, 8, 10]


def test_a_record_with_a_hole_before_the_checkpoint_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CountedRun(tmp_path, stop_after_steps=6)
    run.go()
    run.checkpoints.root = tmp_path
    monkeypatch.setattr(Run, "_changes_since", lambda self, checkpoint: [])
    path = run.run.record.path
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step": 5,' not in line))
    start(run)
    assert run.lines[-1] == f"warning: {path} has no records of 1 steps before this one: 5"


@pytest.mark.parametrize("becomes", ["gone", "another"])
@pytest.mark.parametrize("next_write", ["record", "roll back"])
def test_a_folder_that_is_moved_under_a_run_ends_it_and_nothing_takes_its_place(
    tmp_path: Path, becomes: str, next_write: str
) -> None:
    folder = tmp_path / "run"
    settings = {"log_every": 1, "divergence": DivergenceConfig(on_bad_step="roll_back")}
    run = CountedRun(folder, checkpoint_every=4, **(settings if next_write == "roll back" else {}))
    start(run)
    step = run.stage.train_step

    def moving(batches: Iterator[int], context: StepContext) -> dict[str, Tensor]:
        if len(run.stage.contexts) != 5:
            return step(batches, context)
        folder.rename(tmp_path / "moved")
        if becomes == "another":
            folder.mkdir()
        bad = {"loss": torch.tensor([math.nan])} if next_write == "roll back" else {}
        return step(batches, context) | bad

    run.stage.train_step = moving
    with pytest.raises(RunFolderGone, match="moved, deleted or unmounted") as ended:
        run.go()
    assert ended.value.exit_code == 74
    assert not folder.exists() or not list(folder.iterdir())
    moved = [json.loads(line)["step"] for line in (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(moved)) == [1, 2, 3, 4, 5]


def test_a_run_that_nobody_hears_goes_on_and_says_so_in_its_folder(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run = CountedRun(tmp_path)
    run.run.report = print
    with os.fdopen(writer, "w", buffering=1) as stream, contextlib.redirect_stdout(RedactingStream(stream, [])):
        run.go()
    assert run.steps() == list(range(1, 11)) and run.checkpoints.steps[-1] == 10
    assert [event["reason"] for event in run.run.events(LOST_OUTPUT)] == ["standard output: Broken pipe"]
