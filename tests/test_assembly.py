"""Stage 2 in one process, without DeepSpeed: interrupted, resumed, and refused where something does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, Study, make_tokenizer, train_var

from launchers import sample
from launchers.assembly import (
    describe_one_batch,
    load_tokenizer,
    load_var,
    open_checkpoints,
    open_codes_or_images,
    open_images,
    validation_source,
)
from launchers.command_line import load_config
from launchers.config import TrainConfig
from models.generation import check_configs_agree
from models.var import VAR, VARConfig
from training.checkpoint import describe, write_model
from training.distributed import World
from training.tracking import RunRecord

TIMES = ("time", "images_per_second", "tokens_per_second", "data_wait_share")  # what no two runs share


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
    assert sample.tokenizer_of(config.run) == config.tokenizer


def test_a_run_of_another_world_is_refused_before_anything_starts(study: Study) -> None:
    config = study.train_config("alone", stop_after_steps=1)
    train_var(config)
    with pytest.raises(ValueError, match="written by 1 ranks, this run has 2"):
        open_checkpoints(config, World(world_size=2))


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


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_data_of_another_number_of_classes_is_refused(study: Study, kind: str) -> None:
    config = study.train_config("crowded", kind=kind)
    with pytest.raises(ValueError, match="has 3 classes, model.num_classes is 4"):
        train_var(replace(config, model=replace(VAR_CONFIG, num_classes=4)))


def test_validation_shows_every_sample_once_over_all_ranks_at_every_call(study: Study) -> None:
    config = study.train_config(kind="images")
    dataset = open_images(
        config.data.validation, VQVAE_CONFIG, config.data.views, seed=0, random_views=False
    )
    sources = [validation_source(dataset, config.engine, World(rank=rank, world_size=3)) for rank in range(3)]
    for _ in range(2):
        passes = [list(source()) for source in sources]
        weights = torch.cat([batch.weights for batches in passes for batch in batches])
        assert weights.sum() == len(dataset) and len({len(batches) for batches in passes}) == 1


def test_a_batch_is_described_by_what_is_in_it(study: Study) -> None:
    config = study.train_config()
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    for kind, shape in (("codes", "(2, 5)"), ("images", "(2, 3, 8, 8)")):
        folder = str(study.folder / kind / "train")
        dataset = open_codes_or_images(folder, config, tokenizer.config, sha256, random_views=True)
        said = describe_one_batch(dataset, micro_batch=2)
        assert said.startswith(f"{len(dataset)} samples; one batch of {kind} {shape}, labels ")


def test_codes_of_another_tokenizer_are_refused(study: Study, tmp_path: Path) -> None:
    write_model(tmp_path / "other", make_tokenizer(seed=1).state_dict(), describe(VQVAE_CONFIG))
    with pytest.raises(ValueError, match="tokenizer_sha256"):
        train_var(replace(study.train_config("misled"), tokenizer=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"patch_nums": (1, 3)}, r"the transformer has patch_nums \(1, 3\), the tokenizer \(1, 2\)"),
        ({"vocab_size": 32}, "the transformer has vocab_size 32, the tokenizer 16"),
        ({"code_width": 8}, "the transformer has code_width 8, the tokenizer 4"),
    ],
)
def test_a_transformer_that_does_not_fit_its_tokenizer_is_refused(change: dict[str, Any], message: str) -> None:
    check_configs_agree(VAR_CONFIG, VQVAE_CONFIG)
    with pytest.raises(ValueError, match=message):
        check_configs_agree(replace(VAR_CONFIG, **change), VQVAE_CONFIG)


def test_models_come_back_from_disk_as_they_were(study: Study, tmp_path: Path) -> None:
    tokenizer, sha256 = load_tokenizer(str(study.folder / "tokenizer"))
    assert tokenizer.config == VQVAE_CONFIG and len(sha256) == 64
    write_model(tmp_path, VAR(VAR_CONFIG, seed=2).state_dict(), describe(VAR_CONFIG))
    var = load_var(str(tmp_path))
    assert var.config == VAR_CONFIG and torch.equal(var.head.weight, VAR(VAR_CONFIG, seed=2).head.weight)


def test_a_model_whose_config_was_edited_is_refused_by_key(tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG) | {"dpeth": 2})
    with pytest.raises(ValueError, match="unknown key 'dpeth'"):
        load_var(str(tmp_path))


def test_configs_on_disk_are_plain_json(study: Study) -> None:
    config = json.loads((study.folder / "tokenizer" / "config.json").read_text())
    assert config["kind"] == "VQVAE" and config["patch_nums"] == [1, 2]
    assert VARConfig(**{key: value for key, value in describe(VAR_CONFIG).items() if key != "kind"}) == VAR_CONFIG
