"""Stage 2 in one process, without DeepSpeed: interrupted, resumed, and refused where something does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, Study, train_var, write_models

from launchers.setup.config_files import load_config
from launchers.setup.loading import load_var, tokenizer_of
from launchers.setup.running import open_checkpoints
from launchers.setup.settings import TrainConfig
from models.var import VAR
from training.checkpoints.commit import DamagedCheckpoint, candidates, read_manifest, sealed
from training.engine.distributed import World
from training.supervision.history import START, STOP, History
from training.supervision.stopping import Stopped
from training.tracking.record import RunRecord

TIMES = ("time", "images_per_second", "tokens_per_second", "data_wait_share", "goodput")  # what no two runs share


def losses(config: TrainConfig) -> list[dict[str, Any]]:
    records = RunRecord(Path(config.run)).read()
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(study: Study) -> None:
    whole, part = study.train_config("whole"), study.train_config("part", stop_after_steps=3)
    state, model = train_var(whole)
    train_var(part)
    resumed_state, resumed = train_var(replace(part, loop=whole.loop))
    assert state == resumed_state and state.step > 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert losses(whole) == losses(part)


def test_steps_that_a_crash_left_without_a_checkpoint_are_recorded_once(study: Study) -> None:
    config = study.train_config("crashed", stop_after_steps=2)
    train_var(config)
    lost = {"kind": "train", "step": 3, "loss_avg": 99.0}
    RunRecord(Path(config.run)).write([lost])
    train_var(study.train_config("crashed", stop_after_steps=4))
    taken = [record["step"] for record in losses(config) if record["kind"] == "train"]
    assert taken == [1, 2, 3, 4]
    assert 99.0 not in [record["loss_avg"] for record in losses(config)]


def test_a_run_folder_holds_the_config_that_made_it(study: Study) -> None:
    config = study.train_config("recorded", stop_after_steps=1)
    train_var(config)
    assert load_config(TrainConfig, str(Path(config.run) / "config.yaml")) == config
    assert tokenizer_of(config.run) == config.tokenizer


def checkpoint_of(config: TrainConfig) -> Path:
    return candidates(Path(config.run) / "checkpoints")[0]


def test_a_run_of_another_world_is_welcome_unless_its_batch_cannot_be_split(study: Study) -> None:
    config = study.train_config("alone", stop_after_steps=1)
    train_var(config)
    assert open_checkpoints(
        config, config.model, World(world_size=2), **read_manifest(checkpoint_of(config))["identity"]
    ).latest()
    with pytest.raises(ValueError, match="global_batch 4 is not divisible by the world size 3"):
        open_checkpoints(config, config.model, World(world_size=3))


def test_a_checkpoint_knows_the_whole_config(study: Study) -> None:
    config = study.train_config("whole_config", stop_after_steps=1)
    train_var(config)
    assert read_manifest(checkpoint_of(config))["config"] == json.loads(json.dumps(asdict(config)))


def test_what_has_changed_at_a_restart_is_told_and_remembered(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.train_config("slower", stop_after_steps=1)
    train_var(config)
    again = replace(config, optimizer=replace(config.optimizer, base_lr=5e-5), loop=replace(config.loop, epochs=1.0))
    train_var(replace(again, loop=replace(again.loop, stop_after_steps=2)))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming")]
    changed = "loop.epochs: 2.0 -> 1.0, loop.stop_after_steps: 1 -> 2, optimizer.base_lr: 0.0001 -> 5e-05"
    assert len(said) == 1 and said[0].endswith(f"; changed: {changed}")
    starts = History(Path(config.run)).events(START)
    assert [start["step"] for start in starts] == [0, 1]
    assert "loop.epochs: 2.0 -> 1.0" in starts[1]["changed"]


def test_who_asked_a_run_to_stop_is_remembered(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise Stopped("SIGUSR1 on rank 1", Path("checkpoints/step-00000002"))

    monkeypatch.setattr("launchers.setup.running.Loop.train", stop)
    config = study.train_config("asked")
    with pytest.raises(Stopped):
        train_var(config)
    event = History(Path(config.run)).events(STOP)[0]
    assert (event["reason"], event["checkpoint"]) == ("SIGUSR1 on rank 1", "step-00000002")


def test_a_run_whose_checkpoints_are_gone_does_not_start_from_zero(study: Study) -> None:
    config = study.train_config("lost", stop_after_steps=1)
    train_var(config)
    shutil.rmtree(Path(config.run) / "checkpoints")
    with pytest.raises(DamagedCheckpoint, match="holds no checkpoint, but .*history.jsonl says that step 1 was saved"):
        train_var(config)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(study: Study) -> None:
    config = study.train_config("young", stop_after_steps=1)
    History(Path(config.run)).note(START, step=0)
    RunRecord(Path(config.run)).write([{"kind": "train", "step": 1, "loss": 9.0}])
    train_var(config)
    assert [record["step"] for record in losses(config)] == [1]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_nothing_else(study: Study) -> None:
    whole = study.train_config("undamaged")
    damaged = study.train_config("damaged", stop_after_steps=5, checkpoint_every=2)
    train_var(whole)
    train_var(damaged)
    (checkpoint_of(damaged) / "weights" / "model.safetensors").write_bytes(b"")
    train_var(replace(damaged, loop=whole.loop))
    assert losses(damaged) == losses(whole)


def test_training_on_images_or_on_their_codes_are_both_possible(study: Study) -> None:
    state, _ = train_var(study.train_config("online", kind="images", stop_after_steps=1))
    assert state.step == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "its seed is 0, this run has 1"),
        ({"data": "train"}, "its data is [0-9a-f]{64}, this run has [0-9a-f]{64}"),
    ],
)
def test_a_run_is_not_continued_as_another_one(study: Study, change: dict[str, Any], message: str) -> None:
    config = study.train_config(f"fixed_{next(iter(change))}", stop_after_steps=1)
    train_var(config)
    if "data" in change:
        change = {"data": replace(config.data, train=config.data.validation)}
    with pytest.raises(ValueError, match=f"of another run: {message}"):
        train_var(replace(config, **change))


def test_training_starts_from_the_weights_it_is_given(study: Study, tmp_path: Path) -> None:
    start = write_models(tmp_path, seed=7)
    config = replace(study.train_config("warm", stop_after_steps=2), init_from=start)
    frozen = replace(config, optimizer=replace(config.optimizer, base_lr=1e-30))  # so small that no weight moves
    assert torch.equal(train_var(frozen)[1].head.weight, VAR(VAR_CONFIG, seed=7).head.weight)
    identity = read_manifest(Path(config.run) / "checkpoints" / "step-00000002")["identity"]
    assert identity["init_from"] == start


def test_a_run_that_has_a_checkpoint_goes_on_from_it_and_from_nothing_else(study: Study, tmp_path: Path) -> None:
    start = write_models(tmp_path / "start", seed=7)
    whole, part = (replace(study.train_config(name), init_from=start) for name in ("warm_whole", "warm_part"))
    _, model = train_var(whole)
    train_var(replace(part, loop=replace(part.loop, stop_after_steps=3)))
    _, resumed = train_var(part)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    with pytest.raises(ValueError, match="its init_from is .*start, this run has .*other"):
        train_var(replace(part, init_from=write_models(tmp_path / "other", seed=8)))
    train_var(replace(part, init_from=""))  # nothing left to do, and what it started from is not forgotten
    train_var(part)
    with pytest.raises(ValueError, match="its init_from is None, this run has .*start"):
        train_var(study.train_config("cold", stop_after_steps=1))
        train_var(replace(study.train_config("cold"), init_from=start))


def test_an_unconditional_model_trains_on_data_with_classes(study: Study) -> None:
    config = study.train_config("unconditional", stop_after_steps=1)
    state, model = train_var(replace(config, model=replace(VAR_CONFIG, num_classes=0)))
    assert state.step == 1 and model.class_embedding.weight.shape[0] == 1


def test_without_history_what_is_left_of_a_run_is_evidence_enough(study: Study) -> None:
    config = study.train_config("forgotten", stop_after_steps=1)
    train_var(config)
    (Path(config.run) / "history.jsonl").unlink()
    checkpoint = checkpoint_of(config)
    aside = checkpoint.with_name(f".damaged-{checkpoint.name}-0")
    checkpoint.rename(aside)
    with pytest.raises(DamagedCheckpoint, match="there was one: .damaged-step-00000001-0"):
        train_var(config)
    shutil.rmtree(aside)
    with pytest.raises(DamagedCheckpoint, match="metrics.jsonl is the record of a run"):
        train_var(config)
    assert [record["step"] for record in losses(config)] == [1]  # and nothing is lost


def test_a_damaged_checkpoint_is_not_sampled_exported_or_built_upon(study: Study) -> None:
    config = study.train_config("flipped", stop_after_steps=1)
    train_var(config)
    file = checkpoint_of(config) / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="model.safetensors is damaged .sha256.; name another folder of"):
        load_var(config.run)


def test_other_validation_data_between_two_starts_are_refused(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.train_config("validated", stop_after_steps=1)
    train_var(config)
    assert "is the training data too" not in capsys.readouterr().out
    other = replace(config, data=replace(config.data, validation=config.data.train))
    with pytest.raises(ValueError, match="checkpoint of another run: its validation is [0-9a-f]{64}, this run has"):
        train_var(other)
    assert f"warning: {config.data.train} is the training data too" in capsys.readouterr().out


def test_a_checkpoint_of_before_validation_data_had_an_identity_goes_on(study: Study) -> None:
    config = study.train_config("older", stop_after_steps=1)
    train_var(config)
    folder = Path(config.run) / "checkpoints" / "step-00000001"
    manifest = read_manifest(folder)
    del manifest["identity"]["validation"]
    (folder / "manifest.json").write_bytes(sealed(manifest))
    state, _ = train_var(study.train_config("older", stop_after_steps=2))
    assert state.step == 2
