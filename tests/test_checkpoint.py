"""Checkpoints are whole or absent, and refuse what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import VAR_CONFIG, VQVAE_CONFIG, PlainEngine
from torch import nn

from models.var import VARConfig
from training.checkpoint import Checkpoints, TrainState
from training.distributed import World
from training.model_on_disk import committed_checkpoints, latest_checkpoint


def make_engine(value: float = 1.0) -> PlainEngine:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return PlainEngine(model)


def make_checkpoints(
    root: Path, *, keep: int = 2, world: World = World(), config: VARConfig = VAR_CONFIG, seed: int = 0
) -> Checkpoints:
    return Checkpoints(root, keep=keep, world=world, model_config=config, identity={"seed": seed})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def saved(root: Path) -> Path:
    return make_checkpoints(root).save({"model": make_engine(3.0)}, TrainState(step=5, samples_seen=40))


def test_a_checkpoint_brings_back_weights_and_position(root: Path, saved: Path) -> None:
    engine = make_engine(0.0)
    state = make_checkpoints(root).restore(saved, {"model": engine})
    assert state == TrainState(step=5, samples_seen=40)
    assert (engine.model.weight == 3).all()


def test_every_engine_is_saved_and_loaded_under_its_name(root: Path) -> None:
    engines = {"model": make_engine(1.0), "discriminator": make_engine(2.0)}
    path = make_checkpoints(root).save(engines, TrainState(step=1))
    fresh = {"model": make_engine(0.0), "discriminator": make_engine(0.0)}
    make_checkpoints(root).restore(path, fresh)
    assert (fresh["model"].model.bias == 1).all() and (fresh["discriminator"].model.bias == 2).all()


def test_without_a_manifest_there_is_no_checkpoint(root: Path, saved: Path) -> None:
    (saved / "manifest.json").unlink()
    assert latest_checkpoint(root) is None and committed_checkpoints(root) == []


def test_a_crash_before_the_rename_leaves_the_older_checkpoint_the_newest(
    root: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint.os.rename", crash)
    with pytest.raises(OSError, match="No space left"):
        make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert latest_checkpoint(root) == saved
    monkeypatch.undo()
    again = make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))  # the leftovers are no obstacle
    assert latest_checkpoint(root) == again
    assert not list(root.glob(".tmp-*"))


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
    assert again.restore(root / "step-00000004", {"model": make_engine()}).step == 4
    again.save({"model": make_engine()}, TrainState(step=6))
    assert [int(path.name[-1]) for path in committed_checkpoints(root)] == [1, 4, 6]


def test_what_is_kept_can_be_changed_by_hand(root: Path) -> None:
    checkpoints = make_checkpoints(root, keep=1)
    kept = checkpoints.save({"model": make_engine()}, TrainState(step=1), is_kept=True)
    (kept / "keep").unlink()
    assert checkpoints.restore(kept, {"model": make_engine()}).step == 1  # not damaged by it
    (checkpoints.save({"model": make_engine()}, TrainState(step=2)) / "keep").touch()
    checkpoints.save({"model": make_engine()}, TrainState(step=3))
    assert [int(path.name[-1]) for path in committed_checkpoints(root)] == [2, 3]


def test_saving_a_step_again_replaces_it(root: Path, saved: Path) -> None:
    make_checkpoints(root).save({"model": make_engine(8.0)}, TrainState(step=5, samples_seen=40))
    engine = make_engine(0.0)
    make_checkpoints(root).restore(saved, {"model": engine})
    assert (engine.model.weight == 8).all()


@pytest.mark.parametrize("name", ["model/shard-0.pt", "weights/model.safetensors", "weights/config.json"])
def test_a_flipped_bit_is_found_and_its_file_named(root: Path, saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        make_checkpoints(root).restore(saved, {"model": make_engine()})
    assert str(saved / name) in str(caught.value) and "damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model/shard-0.pt", "weights/model.safetensors"])
def test_a_missing_file_is_named(root: Path, saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{saved / name}: missing"):
        make_checkpoints(root).restore(saved, {"model": make_engine()})


def test_damage_is_found_before_anything_is_loaded(root: Path, saved: Path) -> None:
    (saved / "weights" / "model.safetensors").write_bytes(b"")
    engine = make_engine(0.0)
    with pytest.raises(ValueError, match="damaged"):
        make_checkpoints(root).restore(saved, {"model": engine})
    assert (engine.model.weight == 0).all()


def test_a_manifest_that_is_no_json_is_named(root: Path, saved: Path) -> None:
    (saved / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json is not valid JSON"):
        make_checkpoints(root).restore(saved, {"model": make_engine()})


def test_another_format_is_refused_naming_both(root: Path, saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="checkpoint format 99, this version reads 1"):
        make_checkpoints(root).restore(saved, {"model": make_engine()})


def test_another_number_of_ranks_is_refused_naming_both(root: Path, saved: Path) -> None:
    checkpoints = make_checkpoints(root, world=World(world_size=4))
    with pytest.raises(ValueError, match="written by 1 ranks, this run has 4"):
        checkpoints.restore(saved, {"model": make_engine()})


def test_another_model_is_refused_naming_the_key_and_both_values(root: Path, saved: Path) -> None:
    other = VARConfig(depth=1, patch_nums=(1, 2), vocab_size=32, code_width=4, num_classes=3)
    with pytest.raises(ValueError, match="its vocab_size is 16, this run has 32"):
        make_checkpoints(root, config=other).restore(saved, {"model": make_engine()})


def test_another_identity_is_refused_naming_the_key_and_both_values(root: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match="of another run: its seed is 0, this run has 1"):
        make_checkpoints(root, seed=1).restore(saved, {"model": make_engine()})


def test_another_kind_of_model_is_refused(root: Path, saved: Path) -> None:
    checkpoints = Checkpoints(root, keep=2, world=World(), model_config=VQVAE_CONFIG, identity={"seed": 0})
    with pytest.raises(ValueError, match="its kind is VAR, this run has VQVAE"):
        checkpoints.restore(saved, {"model": make_engine()})
