"""What a study reads of its run folders: the points of validation, the compute that was spent, and what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from study_examples import IMAGES, LOOP, STEPS, planted_run, planted_runs, study_config, train_config, write_run

from launchers.setup.config_files import to_yaml
from launchers.study.reading import Source, planned_runs, read_run, read_source, read_study
from training.laws.study_data import METRICS
from training.tracking.record import RunRecord


def test_a_run_is_read_back_as_it_was_measured(tmp_path: Path) -> None:
    planted = planted_run(8, seed=1)
    run = read_run(write_run(tmp_path, planted))
    assert run is not None and run.num_samples == IMAGES and run.size.is_finished
    assert (run.size.name, run.size.depth, run.size.seed) == ("d8-seed1", 8, 1)
    assert run.size.num_parameters == 41_315_904 and run.size.tokens_per_image == 680
    assert np.array_equal(run.size.images, planted.images)
    for metric in METRICS:
        assert np.array_equal(run.size.metrics[metric], planted.metrics[metric])
        assert run.training[metric] == pytest.approx(planted.final(metric) - 0.05)
    assert run.epochs == pytest.approx(200, rel=1e-4)


def test_a_roll_back_moves_the_data_and_costs_no_compute(tmp_path: Path) -> None:
    """samples_seen is a position in the data, which a roll back advances; what was trained is the steps."""
    folder = write_run(tmp_path, planted_run(6))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    moved = [record | {"samples_seen": record["samples_seen"] + 5 * LOOP.global_batch} for record in records]
    for record in moved:
        record["epoch"] = record["samples_seen"] / IMAGES
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in moved))
    run = read_run(folder)
    assert run is not None and np.array_equal(run.size.images, planted_run(6).images) and run.num_samples == IMAGES


def test_a_run_that_stopped_early_is_unfinished_and_one_that_has_not_begun_is_absent(tmp_path: Path) -> None:
    folder = write_run(tmp_path, planted_run(6))
    RunRecord(folder).forget_after(STEPS // 2)
    run = read_run(folder)
    assert run is not None and not run.size.is_finished and run.epochs < 101
    RunRecord(folder).forget_after(0)
    assert read_run(folder) is None and read_run(tmp_path / "none") is None and not (tmp_path / "none").exists()


def test_a_study_is_read_by_size_and_names_what_is_not_there(tmp_path: Path) -> None:
    runs = planted_runs((8, 6, 10))
    config = study_config(tmp_path, [*runs, planted_run(12)])
    assert planned_runs(config) == ["d8-seed0", "d6-seed0", "d10-seed0", "d12-seed0", "d8-seed1", "d8-seed2"]
    for run in runs:
        write_run(tmp_path, run)
    study = read_study(config)
    assert [size.name for size in study.sizes] == ["d6-seed0", "d8-seed0", "d8-seed1", "d8-seed2", "d10-seed0"]
    assert study.absent == ("d12-seed0",) and study.source == Source()


def test_an_empty_folder_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run there has been evaluated yet; train with"):
        read_study(study_config(tmp_path, [planted_run(6)]))


def test_losses_over_other_vocabularies_are_not_compared(tmp_path: Path) -> None:
    runs = [planted_run(6), planted_run(8)]
    folders = [write_run(tmp_path, run) for run in runs]
    other = train_config(runs[1])
    other = replace(other, model=replace(other.model, vocab_size=512))
    (folders[1] / "config.yaml").write_text(to_yaml(other))
    with pytest.raises(ValueError, match="d8-seed0: model.vocab_size is 512, that of d6-seed0 is 4096"):
        read_study(study_config(tmp_path, runs))


def test_the_entropy_of_a_source_is_read_or_said_to_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "source.json"
    assert read_source("") == Source()
    with pytest.raises(FileNotFoundError, match="known_entropy names a source.json"):
        read_source(str(file))
    file.write_text('{"entropy_last": 1.25, "entropy_avg": 1.5, "entropy": [2, 1], "validation_loss_last": 1.26}')
    assert read_source(str(file)) == Source({"loss_last": 1.25, "loss_avg": 1.5}, {"loss_last": 1.26})
    for wrong in ('{"entropy_last": 1.25}', '{"entropy_last": [1], "entropy_avg": 2}', "[]", "{"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="does not give entropy_last and entropy_avg in nats"):
            read_source(str(file))


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_a_record_that_two_commands_wrote_is_not_fitted(tmp_path: Path, kind: str) -> None:
    folder = write_run(tmp_path, planted_run(6))
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    doubled = next(line for line in reversed(lines) if json.loads(line)["kind"] == kind)
    step = json.loads(doubled)["step"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(doubled)
    with pytest.raises(ValueError, match=f"d6-seed0/metrics.jsonl: has the {kind} record of step {step} after"):
        read_run(folder)
