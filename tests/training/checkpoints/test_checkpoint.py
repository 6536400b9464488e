"""Checkpoints are whole or absent, and refuse what does not fit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, PlainEngine
from torch import nn

from models.var import VARConfig
from training import seams
from training.checkpoints.checkpoint import CheckpointFailed, Checkpoints, Retention, TrainState
from training.checkpoints.commit import DamagedCheckpoint, read_manifest, sealed
from training.checkpoints.model_on_disk import committed_checkpoints, latest_checkpoint
from training.engine.distributed import World
from training.engine.whole_state import WholeState


def make_engine(value: float = 1.0) -> PlainEngine:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return PlainEngine(model)


def make_checkpoints(
    root: Path,
    *,
    keep: int = 2,
    keep_every: int = 0,
    world: World = World(),
    config: VARConfig = VAR_CONFIG,
    seed: int = 0,
    lines: list[str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Checkpoints:
    return Checkpoints(
        root,
        retention=Retention(last=keep, every=keep_every),
        world=world,
        model_config=config,
        identity={"seed": seed},
        config=settings,
        say=print if lines is None else lines.append,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def saved(root: Path) -> Path:
    state = TrainState(step=5, samples_seen=40, useful_seconds=1.5)
    return make_checkpoints(root).save({"model": make_engine(3.0)}, state)


def test_a_checkpoint_brings_back_weights_and_position(root: Path, saved: Path) -> None:
    engine = make_engine(0.0)
    state = make_checkpoints(root).resume({"model": engine})
    assert state == TrainState(step=5, samples_seen=40, useful_seconds=1.5)
    assert (engine.model.weight == 3).all()


def test_without_any_checkpoint_there_is_nothing_to_resume(root: Path) -> None:
    assert make_checkpoints(root).resume({"model": make_engine()}) is None


def test_every_engine_is_saved_and_loaded_under_its_name(root: Path) -> None:
    engines = {"model": make_engine(1.0), "discriminator": make_engine(2.0)}
    make_checkpoints(root).save(engines, TrainState(step=1))
    fresh = {"model": make_engine(0.0), "discriminator": make_engine(0.0)}
    make_checkpoints(root).resume(fresh)
    assert (fresh["model"].model.bias == 1).all() and (fresh["discriminator"].model.bias == 2).all()


def test_moments_steps_and_buffers_come_back(root: Path) -> None:
    engine, fresh = make_engine(1.0), make_engine(0.0)
    for each, value in ((engine, 7.0), (fresh, 0.0)):
        each.model.register_buffer("seen", torch.tensor(value))
        each.state = WholeState(each.model, torch.optim.AdamW(each.model.parameters()), World())
    (engine.model(torch.ones(1, 2)) ** 2).sum().backward()
    engine.state.base.step()
    make_checkpoints(root).save({"model": engine}, TrainState(step=1))
    make_checkpoints(root).resume({"model": fresh})
    assert fresh.state.scalars() == {"step": 1.0} and fresh.model.seen == 7
    for ours, theirs in zip(fresh.model.parameters(), engine.model.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(fresh.state.base.state[ours][name], engine.state.base.state[theirs][name])


def test_the_random_generators_go_on(root: Path) -> None:
    make_checkpoints(root).save({"model": make_engine()}, TrainState(step=1))
    expected = torch.rand(3), random.random()
    engine = make_engine()  # which draws
    make_checkpoints(root).resume({"model": engine})
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1]


def test_the_manifest_tells_what_a_run_was(root: Path) -> None:
    checkpoints = make_checkpoints(root, settings={"loop": {"epochs": 2}})
    path = checkpoints.save({"model": make_engine()}, TrainState(step=1), notes={"mlflow_run_id": "abc"})
    manifest = read_manifest(path)
    assert manifest["world_size"] == 1 and manifest["mlflow_run_id"] == "abc"
    assert manifest["config"] == {"loop": {"epochs": 2}} and len(manifest["config_sha256"]) == 64


def test_changed_settings_are_told_with_both_values(root: Path) -> None:
    path = make_checkpoints(root, settings={"a": {"b": 1, "c": 2}}).save({"model": make_engine()}, TrainState(step=1))
    changed = make_checkpoints(root, settings={"a": {"b": 1, "c": 3}, "d": 4}).changed_settings(path)
    assert list(changed) == ["a.c: 2 -> 3", "d: None -> 4"]


def test_without_a_manifest_there_is_no_checkpoint(root: Path, saved: Path) -> None:
    (saved / "manifest.json").unlink()
    assert latest_checkpoint(root) is None and committed_checkpoints(root) == []


def test_a_failed_save_leaves_the_older_checkpoint_the_newest_and_no_rubbish(root: Path, saved: Path) -> None:
    def full_disk(site: str, value: Any) -> Any:
        if site == "checkpoint.manifest.fsync":
            raise OSError(28, "No space left on device")
        return value

    seams.install(full_disk)
    with pytest.raises(CheckpointFailed, match="step-00000006 is not saved, the newest is step-00000005: .*No space"):
        make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    seams.install(None)
    assert latest_checkpoint(root) == saved and list(root.iterdir()) == [saved]
    again = make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert latest_checkpoint(root) == again


def test_what_a_killed_save_left_behind_is_removed_by_the_next(root: Path, saved: Path) -> None:
    for name in (".tmp-step-00000006", ".old-step-00000001"):
        (root / name / "state").mkdir(parents=True)
    again = make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert sorted(root.iterdir()) == [saved, again]


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(root: Path) -> None:
    checkpoints = make_checkpoints(root, keep=3)
    for step in (10, 9, 100):
        checkpoints.save({"model": make_engine()}, TrainState(step=step))
    assert checkpoints.latest() == root / "step-00000100"
    assert [path.name for path in committed_checkpoints(root)] == ["step-00000009", "step-00000010", "step-00000100"]


def test_only_the_newest_are_kept(root: Path) -> None:
    checkpoints = make_checkpoints(root, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save({"model": make_engine()}, TrainState(step=step))
    assert sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000004"]


def test_those_to_keep_are_not_forgotten_and_do_not_count(root: Path) -> None:
    checkpoints = make_checkpoints(root, keep=2)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save({"model": make_engine()}, TrainState(step=step), is_kept=step in (1, 4))
    assert [int(path.name[-1]) for path in committed_checkpoints(root)] == [1, 3, 4, 5]
    again = make_checkpoints(root, keep=1)  # the run is started again
    assert again.resume({"model": make_engine()}).step == 5
    again.save({"model": make_engine()}, TrainState(step=6))
    assert [int(path.name[-1]) for path in committed_checkpoints(root)] == [1, 4, 6]


def test_those_of_round_steps_are_not_forgotten(root: Path) -> None:
    checkpoints = make_checkpoints(root, keep=1, keep_every=2)
    for step in (1, 2, 3, 4, 5, 7):
        checkpoints.save({"model": make_engine()}, TrainState(step=step))
    assert [int(path.name[-1]) for path in committed_checkpoints(root)] == [2, 4, 7]


def test_what_is_kept_can_be_changed_by_hand(root: Path) -> None:
    checkpoints = make_checkpoints(root, keep=1)
    kept = checkpoints.save({"model": make_engine()}, TrainState(step=1), is_kept=True)
    (kept / "keep").unlink()
    assert checkpoints.resume({"model": make_engine()}).step == 1  # not damaged by it
    (checkpoints.save({"model": make_engine()}, TrainState(step=2)) / "keep").touch()
    checkpoints.save({"model": make_engine()}, TrainState(step=3))
    assert [int(path.name[-1]) for path in committed_checkpoints(root)] == [2, 3]


def test_saving_a_step_again_leaves_what_is_there(root: Path, saved: Path) -> None:
    before = (saved / "manifest.json").stat().st_mtime_ns
    assert make_checkpoints(root).save({"model": make_engine(3.0)}, TrainState(step=5, samples_seen=40)) == saved
    assert (saved / "manifest.json").stat().st_mtime_ns == before


def test_saving_a_step_whose_checkpoint_is_damaged_makes_a_new_one(root: Path, saved: Path) -> None:
    (saved / "weights" / "config.json").unlink()
    make_checkpoints(root).save({"model": make_engine(8.0)}, TrainState(step=5))
    engine = make_engine(0.0)
    make_checkpoints(root).resume({"model": engine})
    assert (engine.model.weight == 8).all()


def damages() -> dict[str, Callable[[Path], Any]]:
    share = "state/share-00000-of-00001.safetensors"
    return {
        "empty file": lambda path: (path / share).write_bytes(b""),
        "cut file": lambda path: (path / share).write_bytes((path / share).read_bytes()[:-9]),
        "flipped bit": lambda path: flip_bit(path / "weights" / "model.safetensors", 700),
        "flipped bit in the config": lambda path: flip_bit(path / "weights" / "config.json", 90),
        "missing file": lambda path: (path / share).unlink(),
        "extra file": lambda path: (path / "state" / "share-00001-of-00002.safetensors").write_bytes(b"x"),
        "no manifest": lambda path: (path / "manifest.json").unlink(),
        "empty manifest": lambda path: (path / "manifest.json").write_text(""),
        "manifest that is no JSON": lambda path: (path / "manifest.json").write_text("{"),
        "flipped bit in the manifest": lambda path: flip_bit(path / "manifest.json", 200),
        "manifest of another step": lambda path: shutil.copy(path.parent / "step-00000005" / "manifest.json", path),
    }


def flip_bit(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position // 8] ^= 1 << position % 8
    file.write_bytes(content)


@pytest.mark.parametrize("kind", damages())
def test_a_damaged_checkpoint_is_passed_over_in_one_line(root: Path, saved: Path, kind: str) -> None:
    newest = make_checkpoints(root).save({"model": make_engine(8.0)}, TrainState(step=6))
    damages()[kind](newest)
    engine, lines = make_engine(0.0), []
    assert make_checkpoints(root, lines=lines).resume({"model": engine}).step == 5
    assert (engine.model.weight == 3).all()
    assert len(lines) == 1 and str(newest) in lines[0] and "falling back to step-00000005" in lines[0]
    assert not newest.exists() and len(list(root.glob(".damaged-step-00000006-*"))) == 1  # and not lost


def test_if_no_checkpoint_is_whole_the_run_does_not_start_from_zero(root: Path, saved: Path) -> None:
    (saved / "weights" / "model.safetensors").write_bytes(b"")
    engine = make_engine(0.0)
    with pytest.raises(DamagedCheckpoint, match="none of 1 checkpoints is whole"):
        make_checkpoints(root, lines=[]).resume({"model": engine})
    assert (engine.model.weight == 0).all()  # nothing was loaded


@pytest.mark.parametrize("version, message", [(1, "format 1, this version reads 2"), (99, "format 99")])
def test_another_format_is_refused_naming_both(root: Path, saved: Path, version: int, message: str) -> None:
    manifest = read_manifest(saved) | {"format": version}
    content = sealed(manifest) if version != 1 else json.dumps(manifest).encode()  # the first one had no seal
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make_checkpoints(root).resume({"model": make_engine()})
    assert saved.exists()


def test_another_model_is_refused_naming_the_key_and_both_values(root: Path, saved: Path) -> None:
    other = VARConfig(depth=1, patch_nums=(1, 2), vocab_size=32, code_width=4, num_classes=3)
    with pytest.raises(ValueError, match="its vocab_size is 16, this run has 32"):
        make_checkpoints(root, config=other).resume({"model": make_engine()})


def test_another_identity_is_refused_naming_the_key_and_both_values(root: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match="of another run: its seed is 0, this run has 1"):
        make_checkpoints(root, seed=1).resume({"model": make_engine()})


def test_another_kind_of_model_is_refused(root: Path, saved: Path) -> None:
    checkpoints = Checkpoints(
        root, retention=Retention(), world=World(), model_config=VQVAE_CONFIG, identity={"seed": 0}
    )
    with pytest.raises(ValueError, match="its kind is VAR, this run has VQVAE"):
        checkpoints.resume({"model": make_engine()})
