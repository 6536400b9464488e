"""A model on disk is found wherever it may lie, and known by its bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, PlainEngine, make_tokenizer
from torch import nn

from models.var import VAR, VARConfig
from training.checkpoints.checkpoint import Checkpoints, Retention, TrainState
from training.checkpoints.model_on_disk import ModelOnDisk, describe, model_sha256, write_model
from training.engine.distributed import World

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, -1.0])}


def save_checkpoint(root: Path, step: int) -> Path:
    checkpoints = Checkpoints(root, retention=Retention(2), world=World(), model_config=VAR_CONFIG, identity={})
    return checkpoints.save({"model": PlainEngine(nn.Linear(2, 2))}, TrainState(step=step))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def saved(root: Path) -> Path:
    return save_checkpoint(root, 5)


def test_a_model_is_found_from_run_checkpoint_and_exported_folder(root: Path, saved: Path, tmp_path: Path) -> None:
    exported = shutil.copytree(saved / "weights", tmp_path / "exported")
    newest = save_checkpoint(root, 6)
    for path, folder in ((root.parent, newest / "weights"), (saved, saved / "weights"), (exported, exported)):
        assert ModelOnDisk.find(path, "VAR") == ModelOnDisk(folder)
        assert ModelOnDisk.find(str(path), "VAR") == ModelOnDisk(folder)


def test_a_transformers_folder_leads_to_its_tokenizer_with_or_without_the_transformer(tmp_path: Path) -> None:
    write_model(tmp_path / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    assert ModelOnDisk.find(tmp_path, "VQVAE").folder == tmp_path / "tokenizer"
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer: holds a VQVAE, a VAR is needed"):
        ModelOnDisk.find(tmp_path, "VAR")
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    assert ModelOnDisk.find(tmp_path, "VAR").folder == tmp_path
    assert ModelOnDisk.find(tmp_path, "VQVAE").folder == tmp_path / "tokenizer"


def test_where_there_is_no_such_model_the_path_is_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match="holds a VAR, a VQVAE is needed"):
        ModelOnDisk.find(saved, "VQVAE")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nothing: no such file or folder"):
        ModelOnDisk.find(tmp_path / "nothing", "VAR")


@pytest.mark.parametrize("kind, option", [("VAR", "--var"), ("VQVAE", "--tokenizer")])
def test_a_file_in_the_place_of_a_folder_is_answered_with_the_import(tmp_path: Path, kind: str, option: str) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: is a file.*launchers/import_weights.py {option} .*--out DIR"):
        ModelOnDisk.find(tmp_path / "a.pth", kind)


def test_who_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    write_model(tmp_path, WEIGHTS, {"kind": "VAR"})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not valid JSON"),
        ("[1]", "holds a list, not settings"),
        ('{"kind": "${oc.env:HOME}"}', "holds a reference"),
        ('{"kind": "VAR", "depth": 1000000}', "depth is 1000000, at most 200 is accepted"),
        ('{"kind": "VAR", "patch_nums": [1, 4096]}', "patch_nums is 4096, at most 128 is accepted"),
        ('{"autoencoder": {"width": 1e300}}', "autoencoder.width is 1e.300, at most 1048576 is accepted"),
        (json.dumps({"patch_nums": list(range(99))}), "patch_nums has 99 values"),
        (" " * 2**20 + "{}", "at most 1048576 are accepted"),
    ],
)
def test_a_config_that_is_none_is_named(saved: Path, text: str, message: str) -> None:
    (saved / "weights" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"weights/config.json.*{message}"):
        ModelOnDisk.find(saved, "VAR")


def test_a_model_on_disk_gives_back_its_weights_to_use_or_to_train(tmp_path: Path) -> None:
    wanted = VAR(VAR_CONFIG, seed=3).state_dict()
    write_model(tmp_path, wanted, describe(VAR_CONFIG))
    found = ModelOnDisk.find(tmp_path, "VAR")
    assert VARConfig(**found.config()) == VAR_CONFIG
    used, trained = found.fill(VAR(VAR_CONFIG, seed=4)), VAR(VAR_CONFIG, seed=4)
    parameters = list(trained.parameters())
    found.copy_into(trained)
    assert all(one is other for one, other in zip(parameters, trained.parameters(), strict=True))
    for model, learns in ((used, False), (trained, True)):
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
        assert model.training == learns and all(value.requires_grad == learns for value in model.parameters())


@pytest.mark.parametrize(
    ("content", "width", "said"),
    [(b"", 2, "cannot be read"), (b"none", 2, "cannot be read"), (None, 3, "cannot be loaded")],
)
def test_weights_that_cannot_be_used_are_named_in_one_line(
    saved: Path, content: bytes | None, width: int, said: str
) -> None:
    found = ModelOnDisk.find(saved, "VAR")
    if content is not None:
        (found.folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors: {said}") as caught:
        found.fill(nn.Linear(width, width))
    assert "\n" not in str(caught.value)


def test_the_identity_changes_with_weights_and_with_config_and_with_nothing_else(tmp_path: Path) -> None:
    weights, other_weights = ({"weight": torch.full((2,), value)} for value in (1.0, 2.0))
    variants = {
        "original": (weights, {"kind": "VAR", "depth": 1}),
        "copy": (weights, {"kind": "VAR", "depth": 1}),
        "trained": (other_weights, {"kind": "VAR", "depth": 1}),
        "deeper": (weights, {"kind": "VAR", "depth": 2}),
    }
    identity = {}
    for name, (values, config) in variants.items():
        write_model(tmp_path / name, values, config)
        identity[name] = ModelOnDisk(tmp_path / name).sha256()
        assert identity[name] == model_sha256(values, config)
    assert identity["original"] == identity["copy"]
    assert len(set(identity.values())) == 3
