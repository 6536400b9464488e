"""launchers/import_weights.py: the weights of public files, bit for bit, in a folder that every launcher takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VAR_CONFIG, VQVAE_CONFIG, command, make_tokenizer, write_public_files

from launchers import import_weights
from launchers.import_weights import ImportConfig
from launchers.setup.loading import load_tokenizer, load_var
from models.var import VAR


def import_files(out: Path, *, dry_run: bool = False, **files: Any) -> None:
    config = ImportConfig(out=str(out), **({"patch_nums": (1, 2)} | files))
    import_weights.launch(command(config, dry_run=dry_run))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_imported_is_what_was_in_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    var, tokenizer = write_public_files(tmp_path, seed=3)
    import_files(tmp_path / "out", var=var, tokenizer=tokenizer)
    loaded, (loaded_tokenizer, _) = load_var(str(tmp_path / "out")), load_tokenizer(str(tmp_path / "out"))
    assert loaded.config == VAR_CONFIG and loaded_tokenizer.config == VQVAE_CONFIG
    assert all(map(torch.equal, loaded.parameters(), VAR(VAR_CONFIG, seed=3).parameters()))
    assert all(map(torch.equal, loaded_tokenizer.parameters(), make_tokenizer(3).parameters()))
    said = capsys.readouterr().out
    for size in ("d1", f"{VAR_CONFIG.num_parameters:,} parameters", "V = 16, C = 4", "(1, 2), 5 tokens"):
        assert size in said
    assert "var_d1.pth" in (tmp_path / "out" / "README.md").read_text()


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    var, tokenizer = write_public_files(tmp_path)
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        import_files(folder, var=var, tokenizer=tokenizer)
    cards = [(folder / "README.md").read_text().replace(str(folder), "DIR") for folder in (first, second)]
    assert cards[0].replace("# a", "# b") == cards[1]
    for folder in (first, second):
        (folder / "README.md").unlink()
    assert contents(first) == contents(second)


def test_either_file_alone_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    var, tokenizer = write_public_files(tmp_path)
    import_files(tmp_path / "var", var=var)
    import_files(tmp_path / "tokenizer", tokenizer=tokenizer)
    assert not (tmp_path / "var" / "tokenizer").exists() and load_var(str(tmp_path / "var")).config == VAR_CONFIG
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["README.md", "tokenizer"]
    assert load_tokenizer(str(tmp_path / "tokenizer"))[0].config == VQVAE_CONFIG
    assert "256 px" not in capsys.readouterr().out


def test_a_tokenizer_alone_gets_the_schedule_of_256_px_and_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(write_public_files(tmp_path)[1])
    weights = {name: value for name, value in weights.items() if "quant_resi" not in name}
    weights |= {f"quantize.quant_resi.qresi.{name}": torch.zeros(shape) for name, shape in PHI_SHAPES.items()}
    torch.save(weights, tmp_path / "one_phi.pth")
    import_files(tmp_path / "out", tokenizer=str(tmp_path / "one_phi.pth"), patch_nums=())
    assert load_tokenizer(str(tmp_path / "out"))[0].config.patch_nums == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert "the schedule is that of 256 px" in capsys.readouterr().out


PHI_SHAPES = {"weight": (4, 4, 3, 3), "bias": (4,)}  # one phi for all: it fits every schedule


def test_a_dry_run_says_what_it_would_write_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    var, tokenizer = write_public_files(tmp_path)
    before = contents(tmp_path)
    import_files(tmp_path / "out", var=var, tokenizer=tokenizer, dry_run=True)
    assert f"would write {tmp_path}/out" in capsys.readouterr().out and contents(tmp_path) == before


def test_two_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    var, tokenizer = write_public_files(tmp_path)
    weights = torch.load(var)
    weights["word_embed.weight"] = torch.zeros(64, 8)
    torch.save(weights, var)
    with pytest.raises(ValueError, match="the transformer has code_width 8, the tokenizer 4"):
        import_files(tmp_path / "out", var=var, tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_kept(tmp_path: Path) -> None:
    var, _ = write_public_files(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        import_files(tmp_path, var=var)
    assert contents(tmp_path) == before
