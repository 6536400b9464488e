"""launchers/verify_shards.py: sound data are said to be, and every fault is a line before the error."""

from __future__ import annotations

from pathlib import Path

import pytest
from malformed_shards import SHARDS, copy_codes
from tiny import Study, command

from data_pipeline.files.damage import DamagedData
from launchers import verify_shards
from launchers.verify_shards import VerifyConfig


@pytest.mark.parametrize("decode", [False, True])
def test_sound_data_are_said_to_be(study: Study, capsys: pytest.CaptureFixture[str], decode: bool) -> None:
    verify_shards.launch(command(VerifyConfig(folder=str(study.folder / "images"), decode=decode)))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("no faults" in line for line in said)


def test_faults_are_said_with_progress(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_shards, "PROGRESS_SECONDS", -1.0)
    SHARDS["a bit of a header flipped"][0](copy_codes(study.folder / "codes/train", tmp_path))
    with pytest.raises(DamagedData, match="1 fault, named above"):
        verify_shards.launch(command(VerifyConfig(folder=str(tmp_path / "data"))))
    said = capsys.readouterr().out
    assert "fault: " in said and "MB/s, faults: 1, " in said and "s left" in said


def test_a_damaged_index_is_a_fault_among_the_others(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        copy_codes(study.folder / "codes" / split, tmp_path).rename(tmp_path / split)
    (tmp_path / "val/index.json").write_text("[]")
    with pytest.raises(DamagedData, match="1 fault, named above"):
        verify_shards.launch(command(VerifyConfig(folder=str(tmp_path))))
    said = capsys.readouterr().out
    assert "val/index.json: malformed index" in said and "train: " in said and "no faults" in said
