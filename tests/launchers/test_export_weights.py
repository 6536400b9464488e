"""launchers/export_weights.py: what was trained or imported goes out bit for bit, in our layout or the public one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, Study, command, make_tokenizer, train_var, write_public_files

from launchers import export_weights, import_weights
from launchers.export_weights import ExportConfig
from launchers.import_weights import ImportConfig
from launchers.setup.assembly import load_models
from launchers.setup.loading import load_tokenizer
from models.var import VAR
from training.checkpoints.model_on_disk import describe, write_model
from training.checkpoints.weights import read_weights


def export(run: str | Path, out: Path, *, dry_run: bool = False, **settings: Any) -> None:
    export_weights.launch(command(ExportConfig(run=str(run), out=str(out), **settings), dry_run=dry_run))


def import_files(var: str, tokenizer: str, out: Path) -> Path:
    import_weights.launch(command(ImportConfig(var=var, tokenizer=tokenizer, out=str(out), patch_nums=(1, 2))))
    return out


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_import_then_export_gives_every_weight_back_bit_for_bit(tmp_path: Path) -> None:
    var, tokenizer = write_public_files(tmp_path, seed=3)
    export(import_files(var, tokenizer, tmp_path / "in"), tmp_path / "out", format="reference")
    assert same(read_weights(tmp_path / "out" / "var_d1.pth"), read_weights(var))
    assert same(read_weights(tmp_path / "out" / "tokenizer" / "vae_ch32v16z4.pth"), read_weights(tokenizer))
    again = import_files(
        str(tmp_path / "out" / "var_d1.pth"), str(tmp_path / "out/tokenizer/vae_ch32v16z4.pth"), tmp_path / "again"
    )
    for name in ("config.json", "model.safetensors", "tokenizer/config.json", "tokenizer/model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_a_run_is_exported_with_its_tokenizer_and_both_keep_their_bytes(study: Study, tmp_path: Path) -> None:
    config = study.train_config("exported")
    state, trained = train_var(config)
    export(config.run, tmp_path / "out")
    models = load_models(str(tmp_path / "out"))
    assert same(models.var.state_dict(), trained.state_dict())
    assert models.tokenizer_sha256 == load_tokenizer(config.tokenizer)[1]  # so its codes are still its codes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{state.step} steps, {state.samples_seen} samples seen" in card and "loss_avg" in card


def test_a_run_in_the_public_format_has_the_public_names(study: Study, tmp_path: Path) -> None:
    config = study.train_config("handed_back", stop_after_steps=1)
    _, trained = train_var(config)
    export(config.run, tmp_path / "out", format="reference")
    models = load_models(
        str(tmp_path / "out" / "var_d1.pth"), str(tmp_path / "out/tokenizer/vae_ch32v16z4.pth"), (1, 2)
    )
    assert same(models.var.state_dict(), trained.state_dict())
    assert models.tokenizer_sha256 == load_tokenizer(config.tokenizer)[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "build_vae_var(" in card and "recorded no validation" in card


@pytest.mark.parametrize("layout, file", [("safetensors", "model.safetensors"), ("reference", "vae_ch32v16z4.pth")])
def test_a_tokenizer_is_exported_alone(study: Study, tmp_path: Path, layout: str, file: str) -> None:
    export(study.folder / "tokenizer", tmp_path / "out", format=layout)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "tokenizer"]
    assert (tmp_path / "out" / "tokenizer" / file).is_file()


def test_the_tokenizer_may_be_named_as_a_folder_or_as_a_public_file(tmp_path: Path) -> None:
    write_model(tmp_path / "var", VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    write_model(tmp_path / "vae", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    _, file = write_public_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="add --tokenizer PATH"):
        export(tmp_path / "var", tmp_path / "none")
    for name, tokenizer in (("a", str(tmp_path / "vae")), ("b", file)):
        export(tmp_path / "var", tmp_path / name, tokenizer=tokenizer)
        assert load_tokenizer(str(tmp_path / name))[1] == load_tokenizer(str(tmp_path / "vae"))[1]


def test_a_tokenizer_takes_no_tokenizer(study: Study, tmp_path: Path) -> None:
    tokenizer = str(study.folder / "tokenizer")
    with pytest.raises(ValueError, match="is a tokenizer itself: leave it out"):
        export(tokenizer, tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize(
    "change, reason", [({"num_classes": 0}, "number of classes"), ({"norm": "layer_norm"}, "norm 'layer_norm'")]
)
def test_what_the_public_code_cannot_build_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    config = replace(VAR_CONFIG, **change)
    write_model(tmp_path / "in", VAR(config).state_dict(), describe(config))
    write_model(tmp_path / "in" / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    with pytest.raises(ValueError, match=f"{reason}.*use --format safetensors"):
        export(tmp_path / "in", tmp_path / "out", format="reference")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "in", tmp_path / "out")
    assert load_models(str(tmp_path / "out")).var.config == config


def test_a_dry_run_says_what_it_would_write_and_writes_nothing(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(study.folder / "tokenizer", tmp_path / "out", dry_run=True, format="reference")
    assert f"would write tokenizer/vae_ch32v16z4.pth to {tmp_path}/out" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no model there"):
        export(tmp_path, tmp_path / "out")


def test_an_export_that_fails_leaves_nothing(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_weights.shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        export(study.folder / "tokenizer", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
