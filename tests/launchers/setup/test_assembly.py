"""Models and data are put together, and refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, Study, make_tokenizer, train_var, write_models, write_public_files

from launchers.setup.assembly import (
    RunData,
    describe_one_batch,
    load_models,
    open_codes_or_images,
    open_images,
    refuse_other_classes,
)
from launchers.setup.loading import load_tokenizer
from models.generation import check_configs_agree
from models.var import VAR, VARConfig
from models.vqvae import VQVAE
from training.checkpoints.model_on_disk import describe, write_model
from training.engine.distributed import World


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_data_of_another_number_of_classes_is_refused(study: Study, kind: str) -> None:
    config = study.train_config("crowded", kind=kind)
    with pytest.raises(ValueError, match="has 3 classes, model.num_classes is 4"):
        train_var(replace(config, model=replace(VAR_CONFIG, num_classes=4)))


def test_validation_shows_every_sample_once_over_all_ranks_at_every_call(study: Study) -> None:
    config = study.train_config(kind="images")
    dataset = open_images(config.data.validation, VQVAE_CONFIG, config.data, seed=0, random_views=False)
    shares = [RunData.of(config, World(rank=rank, world_size=3), dataset, dataset) for rank in range(3)]
    for _ in range(2):
        passes = [list(share.validation_batches()) for share in shares]
        weights = torch.cat([batch.weights for batches in passes for batch in batches])
        assert weights.sum() == len(dataset) and len({len(batches) for batches in passes}) == 1


def test_the_samples_of_a_step_have_names_whoever_reads_them(study: Study) -> None:
    config = study.train_config(kind="images")
    dataset = open_images(config.data.train, VQVAE_CONFIG, config.data, seed=0, random_views=True)
    names = [RunData.of(config, World(rank, 2), dataset, dataset).names(4) for rank in (0, 1)]
    alone = RunData.of(config, World(), dataset, dataset).names(4)
    assert names[0] + names[1] == alone and len(set(alone)) == 4
    assert all(name.split(":")[0].endswith(".tar") for name in alone)


def test_a_batch_is_described_by_what_is_in_it(study: Study) -> None:
    config = study.train_config()
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    for kind, shape in (("codes", "(2, 5)"), ("images", "(2, 3, 8, 8)")):
        folder = str(study.folder / kind / "train")
        dataset = open_codes_or_images(
            folder, tokenizer.config, sha256, config.data, num_classes=3, seed=0, random_views=True
        )
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


def test_a_run_and_its_checkpoint_come_with_the_tokenizer_they_were_trained_with(study: Study) -> None:
    config = study.train_config("loaded", stop_after_steps=1)
    _, trained = train_var(config)
    _, sha256 = load_tokenizer(config.tokenizer)
    checkpoint = Path(config.run) / "checkpoints" / "step-00000001"
    for run in (config.run, str(checkpoint), str(checkpoint / "weights")):
        models = load_models(run)
        assert torch.equal(models.var.head.weight, trained.head.weight) and models.tokenizer_sha256 == sha256
        assert models.tokenizer.config == VQVAE_CONFIG
        for model in (models.var, models.tokenizer):
            assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_comes_with_the_tokenizer_in_it(tmp_path: Path) -> None:
    models = load_models(write_models(tmp_path / "exported"))
    assert models.var.config == VAR_CONFIG and models.tokenizer_sha256 == load_tokenizer(str(tmp_path / "exported"))[1]


def test_public_files_are_loaded_as_their_import_would_be(tmp_path: Path) -> None:
    var, tokenizer = write_public_files(tmp_path)
    models = load_models(var, tokenizer, (1, 2))
    imported = load_models(write_models(tmp_path / "imported"))
    assert models.tokenizer_sha256 == imported.tokenizer_sha256
    assert all(map(torch.equal, models.var.parameters(), imported.var.parameters()))
    assert load_models(str(tmp_path / "imported"), tokenizer).tokenizer_sha256 == models.tokenizer_sha256
    assert load_models(var, str(tmp_path / "imported"), (1, 2)).tokenizer_sha256 == models.tokenizer_sha256


def test_a_transformer_without_a_tokenizer_needs_one_named(tmp_path: Path) -> None:
    write_model(tmp_path / "alone", VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    var, _ = write_public_files(tmp_path)
    for run, patch_nums in ((str(tmp_path / "alone"), ()), (var, (1, 2))):
        with pytest.raises(FileNotFoundError, match=f"{run}: nothing there names its tokenizer; add --tokenizer PATH"):
            load_models(run, "", patch_nums)


def test_another_tokenizer_than_the_one_trained_with_is_refused(study: Study, tmp_path: Path) -> None:
    config = study.train_config("misread", stop_after_steps=1)
    train_var(config)
    other = write_models(tmp_path / "other", seed=1)
    for run in (config.run, write_models(tmp_path / "exported")):
        with pytest.raises(ValueError, match="was trained with tokenizer [0-9a-f]{12}, this one is [0-9a-f]{12}"):
            load_models(run, other)


def test_a_schedule_is_refused_where_the_model_has_another(tmp_path: Path) -> None:
    run = write_models(tmp_path)
    assert load_models(run, patch_nums=(1, 2)).var.config == VAR_CONFIG
    with pytest.raises(ValueError, match=r"patch_nums is \(1, 3\), .* has \(1, 2\); leave it out"):
        load_models(run, patch_nums=(1, 3))


def test_a_tokenizer_of_another_schedule_is_refused(tmp_path: Path) -> None:
    var, _ = write_public_files(tmp_path)
    config = replace(VQVAE_CONFIG, patch_nums=(1, 3))
    write_model(tmp_path / "wide", VQVAE(config).state_dict(), describe(config))
    with pytest.raises(ValueError, match=r"patch_nums \(1, 2\), the tokenizer \(1, 3\)"):
        load_models(var, str(tmp_path / "wide"), (1, 2))


def test_configs_on_disk_are_plain_json(study: Study) -> None:
    config = json.loads((study.folder / "tokenizer" / "config.json").read_text())
    assert config["kind"] == "VQVAE" and config["patch_nums"] == [1, 2]
    assert VARConfig(**{key: value for key, value in describe(VAR_CONFIG).items() if key != "kind"}) == VAR_CONFIG


def test_a_class_number_means_the_same_in_training_and_validation() -> None:
    def data(name: str, classes: list[str]) -> SimpleNamespace:
        return SimpleNamespace(folder=name, index=SimpleNamespace(meta={"classes": classes}))

    refuse_other_classes(data("train", ["cat", "dog"]), data("val", ["cat", "dog"]))
    for classes, said in (
        (["dog", "cat"], "val: its class 0 is dog, in train it is cat"),
        (["cat"], "class 1 is None"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse_other_classes(data("train", ["cat", "dog"]), data("val", classes))
