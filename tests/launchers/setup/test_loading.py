"""Models from folders and from public files: sizes are found, what does not fit is named, and so is the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, Study, make_tokenizer, train_var, write_public_files

from launchers.setup.loading import (
    SCHEDULE_OF_LENGTH,
    initialize,
    load_tokenizer,
    load_var,
    place_tokenizer,
    public_tokenizer,
    public_var,
    tokenizer_of,
    trained_tokenizer_sha256,
)
from launchers.setup.settings import TrainConfig
from launchers.train_tokenizer import TokenizerConfig
from models.reference import var_to_state_dict
from models.scales import PATCH_NUMS_256, PATCH_NUMS_512
from models.var import VAR
from models.vqvae import VQVAE
from training.checkpoints.checkpoint import Checkpoints, Retention
from training.checkpoints.model_on_disk import describe, write_model
from training.engine.distributed import World


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


def test_the_public_schedules_are_told_apart_by_their_length() -> None:
    assert sorted(SCHEDULE_OF_LENGTH) == [680, 2240, 9451]  # facts of the released models and the paper's Fig. 5
    assert SCHEDULE_OF_LENGTH[680] == PATCH_NUMS_256 and SCHEDULE_OF_LENGTH[2240] == PATCH_NUMS_512


def test_a_public_transformer_of_a_known_length_needs_no_schedule(tmp_path: Path) -> None:
    config = replace(VAR_CONFIG, patch_nums=PATCH_NUMS_256)
    torch.save(var_to_state_dict(VAR(config)), tmp_path / "var.pth")
    var = public_var(str(tmp_path / "var.pth"))
    assert var.config == config and not var.training


@pytest.mark.parametrize(
    "patch_nums, message",
    [
        ((), "var_d1.pth: has 5 positions, the public schedules have 680, 2240, 9451; add --patch-nums"),
        ((1, 3), r"var_d1.pth: .*5 positions.*\(1, 3\)"),
        ((2, 1), "var_d1.pth: .*strictly increasing"),
    ],
)
def test_a_schedule_that_is_unknown_or_does_not_fit_is_refused(
    tmp_path: Path, patch_nums: tuple[int, ...], message: str
) -> None:
    var, _ = write_public_files(tmp_path)
    assert public_var(var, (1, 2)).config == VAR_CONFIG
    with pytest.raises(ValueError, match=message):
        public_var(var, patch_nums)


def test_a_file_of_the_other_model_or_with_a_name_missing_is_refused(tmp_path: Path) -> None:
    var, tokenizer = write_public_files(tmp_path)
    with pytest.raises(ValueError, match="vae_ch32v16z4.pth: .*is no public file of a VAR transformer"):
        public_var(tokenizer, (1, 2))
    with pytest.raises(ValueError, match="var_d1.pth: .*is no file of a VAR tokenizer"):
        public_tokenizer(var, (1, 2))
    weights = torch.load(tokenizer)
    del weights["encoder.conv_out.bias"]
    torch.save(weights, tokenizer)
    with pytest.raises(ValueError, match="vae_ch32v16z4.pth: .*missing encoder.conv_out.bias"):
        public_tokenizer(tokenizer, (1, 2))


def test_a_public_tokenizer_in_the_place_of_a_folder_is_answered_with_the_import(tmp_path: Path) -> None:
    _, tokenizer = write_public_files(tmp_path)
    with pytest.raises(ValueError, match="launchers/import_weights.py --tokenizer .* --out DIR"):
        load_tokenizer(tokenizer)


def test_a_transformers_tokenizer_lies_in_its_folder_or_is_named_by_its_run(study: Study, tmp_path: Path) -> None:
    config = study.train_config("named", stop_after_steps=1)
    train_var(config)
    sha256 = load_tokenizer(config.tokenizer)[1]
    assert tokenizer_of(config.run) == config.tokenizer and trained_tokenizer_sha256(config.run) == sha256
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    assert tokenizer_of(str(tmp_path)) == "" and trained_tokenizer_sha256(str(tmp_path)) == ""
    write_model(tmp_path / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    assert tokenizer_of(str(tmp_path)) == str(tmp_path / "tokenizer")
    assert trained_tokenizer_sha256(str(tmp_path)) == load_tokenizer(str(tmp_path))[1]


def no_checkpoints(folder: Path, model: Any) -> Checkpoints:
    root, world = folder / "checkpoints", World()
    return Checkpoints(root, retention=Retention(1), world=world, model_config=model.config, identity={})


def train_config(init_from: Path, **model: Any) -> TrainConfig:
    return TrainConfig(run="r", tokenizer="t", model=replace(VAR_CONFIG, **model), init_from=str(init_from))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"depth": 2}, "its depth is 1, this run has 2"),
        ({"norm": "shared_adaln"}, "its norm is adaln, this run has shared_adaln"),
        ({"qk_norm": False}, "its qk_norm is True, this run has False"),
        ({"patch_nums": (1, 3)}, r"its patch_nums is \[1, 2\], this run has \[1, 3\]"),
    ],
)
def test_training_does_not_start_from_a_model_of_other_sizes(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    config = train_config(tmp_path, **change)
    model = VAR(config.model)
    with pytest.raises(ValueError, match=message):
        initialize(model, config, no_checkpoints(tmp_path, model))


@pytest.mark.parametrize("num_classes", [0, 2, 7])
def test_training_goes_on_with_classes_of_ones_own(
    tmp_path: Path, num_classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = VAR(VAR_CONFIG, seed=5)
    write_model(tmp_path, theirs.state_dict(), describe(VAR_CONFIG))
    config = train_config(tmp_path, num_classes=num_classes)
    model, fresh = VAR(config.model), VAR(config.model).class_embedding.weight
    initialize(model, config, no_checkpoints(tmp_path, model))
    rows = model.class_embedding.weight
    assert rows.shape[0] == num_classes + 1
    assert torch.equal(rows[-1], theirs.class_embedding.weight[-1]) and torch.equal(rows[:-1], fresh[:-1])
    others = {name: value for name, value in theirs.state_dict().items() if name != "class_embedding.weight"}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())
    [line] = capsys.readouterr().out.splitlines()
    assert f"has 3 classes, this run has {num_classes}: its class rows start anew" in line


def test_settings_of_initial_weights_do_not_keep_training_from_starting(tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG, seed=5).state_dict(), describe(VAR_CONFIG))
    config = train_config(tmp_path, init_gamma=0.5, init_head=0.5)
    model = VAR(config.model)
    initialize(model, config, no_checkpoints(tmp_path, model))
    assert all(map(torch.equal, model.parameters(), VAR(VAR_CONFIG, seed=5).parameters()))


def test_a_tokenizer_starts_from_the_tokenizer_of_a_transformers_folder(tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    write_model(tmp_path / "tokenizer", make_tokenizer(3).state_dict(), describe(VQVAE_CONFIG))
    quantizer = replace(VQVAE_CONFIG.quantizer, beta=0.5)  # the weight of a loss, which the weights do not show
    config = TokenizerConfig(run="r", model=replace(VQVAE_CONFIG, quantizer=quantizer), init_from=str(tmp_path))
    model = VQVAE(config.model)
    initialize(model, config, no_checkpoints(tmp_path, model))
    assert all(map(torch.equal, model.parameters(), make_tokenizer(3).parameters()))


def test_training_from_a_public_file_is_answered_with_the_import(tmp_path: Path) -> None:
    var, _ = write_public_files(tmp_path)
    with pytest.raises(ValueError, match="launchers/import_weights.py --var"):
        initialize(VAR(VAR_CONFIG), train_config(Path(var)), no_checkpoints(tmp_path, VAR(VAR_CONFIG)))


def test_without_a_model_to_start_from_nothing_is_touched(tmp_path: Path) -> None:
    model = VAR(VAR_CONFIG, seed=5)
    initialize(model, replace(train_config(tmp_path), init_from=""), no_checkpoints(tmp_path, model))
    assert torch.equal(model.head.weight, VAR(VAR_CONFIG, seed=5).head.weight)


@pytest.mark.parametrize("kinds", [{"codes"}, {"images"}, {"codes", "images"}])
def test_codes_need_no_more_of_a_tokenizer_on_the_device_than_its_quantiser(study: Study, kinds: set[str]) -> None:
    tokenizer, _ = load_tokenizer(str(study.folder / "tokenizer"))
    placed = place_tokenizer(tokenizer, torch.device("meta"), kinds=kinds)
    moved = {name.split(".")[0] for name, parameter in placed.named_parameters() if parameter.is_meta}
    everything = {name.split(".")[0] for name, _ in placed.named_parameters()}
    assert moved == (everything if "images" in kinds else {"quantizer"})
