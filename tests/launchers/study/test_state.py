"""Which runs a study has, what each is doing by its folder, and which studies are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT
from study_training import SIZE, STEPS, StudyTraining, record, write_run

from launchers.setup.config_files import load_config, parse_yaml, to_yaml
from launchers.setup.settings import TrainConfig
from launchers.study import state as study_state
from launchers.study.config import StudyConfig, as_setting, study_name
from launchers.study.state import (
    Follower,
    Progress,
    is_done,
    plan_runs,
    refuse_changed_settings,
    saved_step,
)
from training.tracking.record import TrackingConfig

SIX = ["d1", "d2", "d3", "d4", "d5", "d6"]
TWELVE = ["d6", "d8", "d10", "d12", "d14", "d16", "d18", "d20", "d22", "d24", "d26", "d30"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    config = StudyTraining(tmp_path, monkeypatch).config
    monkeypatch.setattr(study_state, "load_config", load_config)  # the real one
    return config


@pytest.mark.parametrize(("file", "sizes"), [("scaling_study.yaml", TWELVE), ("synthetic/scaling_study.yaml", SIX)])
def test_studies_of_this_repository_train_their_sizes_each_in_its_folder(
    file: str, sizes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(StudyConfig, f"configs/{file}", ["repeated=[]"])
    runs = plan_runs(config)
    assert [run.train.model.depth for run in runs] == [int(size[1:]) for size in sizes]
    assert [run.train.run for run in runs] == [f"{config.folder}/{size}-seed0" for size in sizes]
    assert {run.train.tracking for run in runs} == {replace(config.tracking, study=study_name(config))}
    assert all(run.train.loop.validate_per_decade > 0 for run in runs)


def test_repeated_sizes_come_after_all_sizes(config: StudyConfig) -> None:
    runs = plan_runs(replace(config, seeds=(3, 1), repeated=("b",)))
    assert [(run.name, run.train.seed) for run in runs] == [("a-seed3", 3), ("b-seed3", 3), ("b-seed1", 1)]


def test_settings_reach_every_run(config: StudyConfig) -> None:
    tracking = TrackingConfig(mlflow=False, uri="http://tracker:5000", experiment="007", every=5)
    runs = plan_runs(replace(config, settings=("loop.epochs=2", "optimizer.base_lr=1e-3"), tracking=tracking))
    for run in runs:
        assert load_config(TrainConfig, run.file, run.settings) == run.train
        assert (run.train.loop.epochs, run.train.optimizer.base_lr) == (2.0, 1e-3)
        assert run.train.tracking == replace(tracking, study="study")


@pytest.mark.parametrize("value", ["a b", "007", "true", "[1]", "a: b", "", "null", "x #y", "'", 3, True])
def test_a_setting_is_read_back_as_the_value_it_was(value: Any) -> None:
    name, _, text = as_setting("a.b", value).partition("=")
    assert name == "a.b" and parse_yaml(text, name) == (value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": ()}, "sizes is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (1, 1)}, "name one twice"),
        ({"sizes": ("a.yaml", "elsewhere/a.yaml")}, "name one twice"),
        ({"repeated": ("c",)}, "repeated has 'c', which is no size of this study; .*a, b"),
        ({"attempts": 0}, "attempts is 0"),
        ({"settings": ("run=x",)}, "settings has 'run=x'"),
        ({"settings": ("tracking.uri=x",)}, "settings has 'tracking.uri=x'"),
        ({"settings": ("loop.stop_after_steps=3",)}, "a: loop.stop_after_steps is 3"),
        ({"settings": ("loop.epoch=3",)}, "unknown key 'loop.epoch'; did you mean 'loop.epochs'"),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused(config: StudyConfig, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_runs(replace(config, **changes))


def test_sizes_of_other_tokens_are_refused(config: StudyConfig, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(SIZE.format(depth=2).replace("runs/tokenizer", "runs/other"))
    with pytest.raises(ValueError, match="tokenizer is runs/tokenizer for a, runs/other for b"):
        plan_runs(config)


@pytest.mark.parametrize("setting", ["optimizer.base_lr=0.001", "loop.epochs=2", "label_drop=0.0"])
def test_a_begun_run_that_would_become_another_one_is_refused_by_name(config: StudyConfig, setting: str) -> None:
    write_config(config, setting, "watch.timeout_seconds=60", "data.workers=0", "engine.micro_batch=2")
    a, b = plan_runs(replace(config, settings=(setting,)))
    refuse_changed_settings(a)  # what changes no loss may change
    a, b = plan_runs(config)
    with pytest.raises(ValueError, match=f"a-seed0: was trained with {setting}.*, now "):
        refuse_changed_settings(a)
    refuse_changed_settings(b)


def write_config(config: StudyConfig, *settings: str) -> None:
    """Write the config.yaml that a run of size a leaves, trained with further settings."""
    run = plan_runs(replace(config, settings=settings))[0]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(to_yaml(run.train))


@pytest.mark.parametrize(
    ("step", "saved", "validated", "done"),
    [
        (STEPS, STEPS, True, True),
        (STEPS, 9, True, False),
        (STEPS, None, True, False),
        (STEPS, STEPS, False, False),
        (9, 9, True, False),
    ],
)
def test_a_run_is_done_when_its_last_step_is_validated_and_saved(
    config: StudyConfig, step: int, saved: int | None, validated: bool, done: bool
) -> None:
    run = plan_runs(config)[0]
    write_run(run.folder, step=step, saved=saved, validated=validated)
    progress = Follower(run).look()
    assert is_done(run, progress) == done
    assert (progress.step, progress.total_steps, saved_step(run)) == (step, STEPS, saved or 0)
    longer = plan_runs(replace(config, settings=("loop.epochs=2",)))[0]
    assert not is_done(longer, Follower(longer).look())


def test_a_run_is_followed_through_records_that_are_added_and_taken_back(config: StudyConfig) -> None:
    run = plan_runs(config)[0]
    follower = Follower(run)
    assert follower.look() == Progress()
    write_run(run.folder, step=4)
    assert (follower.look().step, follower.look().loss_avg) == (4, 3 / 4)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record("train", 5)) + "\n" + '{"kind": "tra')
    assert (follower.look().step, follower.look().loss_avg) == (5, 3 / 4)  # as it was validated last
    replaced = run.folder / "new"
    replaced.write_text(json.dumps(record("train", 2)) + "\n")
    replaced.replace(run.folder / "metrics.jsonl")
    assert follower.look().step == 2
