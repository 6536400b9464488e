"""Checkpoints bring back what was saved, by any number of ranks, and refuse what is damaged or does not fit."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from malformed_checkpoints import DAMAGES
from tiny import VAR_CONFIG, VQVAE_CONFIG, PlainEngine
from torch import Tensor, nn

from training.checkpoints.checkpoint import (
    CheckpointFailed,
    Checkpoints,
    Retention,
    SavedTensors,
    Share,
    TrainState,
)
from training.checkpoints.commit import (
    DamagedCheckpoint,
    UnreadableCheckpoint,
    committed_checkpoints,
    latest_checkpoint,
    read_manifest,
    sealed,
)
from training.checkpoints.model_on_disk import ModelOnDisk, describe
from training.engine.distributed import World
from training.engine.whole_state import WholeState


def make_engine(value: float = 1.0) -> PlainEngine:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    nn.init.constant_(model.bias, value)
    return PlainEngine(model)


def make_checkpoints(root: Path, *, retention: Retention = Retention(), **changes: Any) -> Checkpoints:  # noqa: B008
    settings = {"world": World(), "model_config": VAR_CONFIG, "identity": {"seed": 0}} | changes
    return Checkpoints(root, retention=retention, **settings)


def steps_of(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in committed_checkpoints(root)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def saved(root: Path) -> Path:
    state = TrainState(step=5, samples_seen=40, useful_seconds=1.5)
    return make_checkpoints(root).save({"model": make_engine(3.0)}, state)


def draws() -> tuple[list[float], ...]:
    """Normal numbers, which Python and numpy draw in pairs and keep one of."""
    return [random.gauss(0, 1) for _ in range(3)], np.random.randn(3).tolist(), torch.randn(3).tolist()


@pytest.mark.parametrize("keeps_one", [False, True])
def test_the_random_generators_go_on(root: Path, keeps_one: bool) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    if keeps_one:
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    make_checkpoints(root).save({"model": make_engine()}, TrainState(step=1))
    expected = draws()
    assert draws() != expected
    make_checkpoints(root).resume({"model": make_engine()})
    assert draws() == expected


def test_every_engine_brings_back_weights_moments_steps_buffers_and_position(root: Path) -> None:
    engines, fresh = ({"model": make_engine(value), "discriminator": make_engine(2 * value)} for value in (1.0, 0.0))
    for each, value in [*((engine, 7.0) for engine in engines.values()), *((engine, 0.0) for engine in fresh.values())]:
        each.model.register_buffer("seen", torch.tensor(value))
        each.state = WholeState(each.model, torch.optim.AdamW(each.model.parameters()), World())
    for engine in engines.values():
        (engine.model(torch.ones(1, 2)) ** 2).sum().backward()
        engine.state.base.step()
    assert make_checkpoints(root).resume(fresh) is None
    state = TrainState(step=5, samples_seen=40, useful_seconds=1.5)
    make_checkpoints(root).save(engines, state)
    assert make_checkpoints(root).resume(fresh) == state
    for name, engine in fresh.items():
        assert engine.state.scalars() == {"step": 1.0} and engine.model.seen == 7
        for ours, theirs in zip(engine.model.parameters(), engines[name].model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            for moment in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(
                    engine.state.base.state[ours][moment], engines[name].state.base.state[theirs][moment]
                )


def test_the_manifest_tells_what_a_run_was_and_what_has_changed_since(root: Path) -> None:
    checkpoints = make_checkpoints(root, config={"a": {"b": 1, "c": 2}})
    path = checkpoints.save({"model": make_engine()}, TrainState(step=1), notes={"mlflow_run_id": "abc"})
    manifest = read_manifest(path)
    assert manifest["world_size"] == 1 and manifest["mlflow_run_id"] == "abc"
    assert manifest["config"] == {"a": {"b": 1, "c": 2}} and len(manifest["config_sha256"]) == 64
    changed = make_checkpoints(root, config={"a": {"b": 1, "c": 3}, "d": 4}).changed_settings(path)
    assert list(changed) == ["a.c: 2 -> 3", "d: None -> 4"]


def test_a_failed_save_leaves_the_older_checkpoint_the_newest_and_no_rubbish(
    root: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(CheckpointFailed, match="step-00000006 is not saved, the newest is step-00000005: .*space"):
            make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert latest_checkpoint(root) == saved and list(root.iterdir()) == [saved]
    again = make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert latest_checkpoint(root) == again


def test_the_new_name_is_forced_to_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        forced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (root / "step-00000006").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert forced[-1] == (str(root), True)


def test_what_a_killed_save_left_behind_is_removed_by_the_next(root: Path, saved: Path) -> None:
    for name in (".tmp-step-00000006", ".old-step-00000001"):
        (root / name / "state").mkdir(parents=True)
    again = make_checkpoints(root).save({"model": make_engine()}, TrainState(step=6))
    assert sorted(root.iterdir()) == [saved, again]


def test_those_to_keep_are_not_forgotten_and_do_not_count(root: Path) -> None:
    checkpoints = make_checkpoints(root)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save({"model": make_engine()}, TrainState(step=step), is_kept=step in (1, 4))
    assert steps_of(root) == [1, 3, 4, 5]
    again = make_checkpoints(root, retention=Retention(1))  # the run is started again
    assert again.resume({"model": make_engine()}).step == 5
    again.save({"model": make_engine()}, TrainState(step=6))
    assert steps_of(root) == [1, 4, 6]


def test_what_is_kept_can_be_changed_by_hand(root: Path) -> None:
    checkpoints = make_checkpoints(root, retention=Retention(1))
    kept = checkpoints.save({"model": make_engine()}, TrainState(step=1), is_kept=True)
    (kept / "keep").unlink()
    assert checkpoints.resume({"model": make_engine()}).step == 1  # not damaged by it
    (checkpoints.save({"model": make_engine()}, TrainState(step=2)) / "keep").touch()
    checkpoints.save({"model": make_engine()}, TrainState(step=3))
    assert steps_of(root) == [2, 3]


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


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_in_one_line(root: Path, kind: str) -> None:
    for step in (1, 2):
        newest = make_checkpoints(root).save({"model": make_engine(float(step))}, TrainState(step=step))
    DAMAGES[kind](newest)
    engine, lines = make_engine(0.0), []
    assert make_checkpoints(root, report=lines.append).resume({"model": engine}).step == 1
    assert (engine.model.weight == 1).all()
    assert len(lines) == 1 and str(newest) in lines[0] and "falling back to step-00000001" in lines[0]
    assert not newest.exists() and len(list(root.glob(".damaged-step-00000002-*"))) == 1  # and not lost


def test_if_no_checkpoint_is_whole_the_run_does_not_start_from_zero(root: Path, saved: Path) -> None:
    (saved / "weights" / "model.safetensors").write_bytes(b"")
    engine = make_engine(0.0)
    with pytest.raises(DamagedCheckpoint, match="none of 1 checkpoints is whole"):
        make_checkpoints(root, report=lambda line: None).resume({"model": engine})
    assert (engine.model.weight == 0).all()  # nothing was loaded


@pytest.mark.parametrize("version, message", [(1, "format 1, this version reads 2"), (99, "format 99")])
def test_another_format_is_refused_naming_both(root: Path, saved: Path, version: int, message: str) -> None:
    manifest = read_manifest(saved) | {"format": version}
    content = sealed(manifest) if version != 1 else json.dumps(manifest).encode()  # the first one had no seal
    (saved / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make_checkpoints(root).resume({"model": make_engine()})
    assert saved.exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_config": replace(VAR_CONFIG, vocab_size=32)}, "its vocab_size is 16, this run has 32"),
        ({"model_config": VQVAE_CONFIG}, "its kind is VAR, this run has VQVAE"),
        ({"identity": {"seed": 1}}, "of another run: its seed is 0, this run has 1"),
    ],
)
def test_another_model_or_run_is_refused_naming_the_key_and_both_values(
    root: Path, saved: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_checkpoints(root, **change).resume({"model": make_engine()})


def tensors(*, averaged: bool = False) -> dict[str, Tensor]:
    kinds = ("weight", "exp_avg", "exp_avg_sq", *(["ema"] if averaged else []))
    names = [f"model/{kind}/layer{n}.weight" for kind in kinds for n in range(6)]
    names += [f"discriminator/weight/layer{n}" for n in range(3)]
    return {name: torch.full((8, n + 1), float(n)) for n, name in enumerate(names)}


def write_shares(folder: Path, world_size: int, offered: dict[str, Tensor]) -> list[str]:
    """Let every rank of a world write its share; all names, and no name twice."""
    names: list[str] = []
    for rank in range(world_size):
        share = Share(World(rank, world_size), describe(VAR_CONFIG))
        for name, tensor in offered.items():
            share.offer(name, tensor)
        share.add_random_state({"torch": torch.tensor([rank], dtype=torch.uint8)})
        for name, content in share.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            names.append(name)
    assert len(names) == len(set(names))
    return names


@pytest.mark.parametrize(("world_size", "averaged"), [(1, False), (2, True), (5, True)])
def test_all_that_the_ranks_were_offered_is_read_back(tmp_path: Path, world_size: int, averaged: bool) -> None:
    offered = tensors(averaged=averaged)
    saved = SavedTensors(tmp_path, write_shares(tmp_path, world_size, offered))
    for name, tensor in offered.items():
        assert torch.equal(saved.read(*name.split("/", 1)), tensor), name
    for rank in range(world_size):
        assert saved.random_state(rank)["torch"].tolist() == [rank]
    assert ModelOnDisk(tmp_path / "weights").is_whole and ModelOnDisk(tmp_path / "ema").is_whole == averaged


def test_the_ranks_write_about_as_much(tmp_path: Path) -> None:
    write_shares(tmp_path, 3, tensors())
    sizes = [file.stat().st_size for file in sorted((tmp_path / "state").iterdir())]
    sizes[0] += (tmp_path / "weights" / "model.safetensors").stat().st_size
    assert max(sizes) < 1.5 * min(sizes)


def test_a_tensor_is_copied_since_the_next_may_reuse_its_memory() -> None:
    share, tensor = Share(World(), describe(VAR_CONFIG)), torch.ones(3)
    share.offer("model/exp_avg/a", tensor)
    tensor.zero_()
    content = dict(share.files())["state/share-00000-of-00001.safetensors"]
    assert torch.ones(3).numpy().tobytes() in content


def test_an_average_that_was_not_kept_begins_with_the_weight(tmp_path: Path) -> None:
    offered = tensors()
    saved = SavedTensors(tmp_path, write_shares(tmp_path, 1, offered))
    assert torch.equal(saved.read("model", "ema/layer2.weight"), offered["model/weight/layer2.weight"])


def test_what_a_library_says_without_a_number_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("too many open files")

    names = write_shares(tmp_path, 1, tensors())
    monkeypatch.setattr("training.checkpoints.checkpoint.safe_open", fail)
    with pytest.raises(UnreadableCheckpoint, match=r"cannot be read \(too many open files\)"):
        SavedTensors(tmp_path, names)


def test_a_tensor_that_is_not_there_and_a_file_that_is_none_are_named(tmp_path: Path) -> None:
    names = write_shares(tmp_path, 1, tensors())
    with pytest.raises(DamagedCheckpoint, match="has no model/exp_avg/other"):
        SavedTensors(tmp_path, names).read("model", "exp_avg/other")
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DamagedCheckpoint, match="weights/model.safetensors is no file of tensors"):
        SavedTensors(tmp_path, names)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
@pytest.mark.parametrize("what", ["manifest.json", "weights/model.safetensors", "folder", "root"])
def test_what_cannot_be_read_is_not_taken_for_damage(
    root: Path, saved: Path, what: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start on storage that fails renames nothing; the next start finds the same checkpoint."""
    newer = make_checkpoints(root).save({"model": make_engine(4.0)}, TrainState(step=6))
    open_descriptor, open_file, scan = os.open, open, os.scandir
    suffix = {"folder": str(newer), "root": str(root)}.get(what, f"{newer.name}/{what}")

    def failing(function: Any) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).endswith(suffix):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(open_descriptor))
        patch.setattr("builtins.open", failing(open_file))
        patch.setattr(os, "scandir", failing(scan))
        with pytest.raises(UnreadableCheckpoint, match=f"{os.strerror(number)}.*no checkpoint was renamed: try again"):
            make_checkpoints(root).resume({"model": make_engine()})
    assert sorted(path.name for path in root.iterdir()) == [saved.name, newer.name]
    state = make_checkpoints(root).resume({"model": make_engine()})
    assert state is not None and state.step == 6
