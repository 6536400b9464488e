"""launchers/index_shards.py: says what it indexed, what it left out, and does nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_shards import write_two
from tiny import command

from launchers import index_shards
from launchers.index_shards import IndexConfig


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write_two(tmp_path / "theirs")


def test_indexing_is_said_and_not_repeated(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = IndexConfig(shards=(f"{theirs}/part-{{000..001}}.tar",), out=str(tmp_path / "out"))
    index_shards.launch(command(config, dry_run=True))
    assert "would index 2 tars" in capsys.readouterr().out and not (tmp_path / "out").exists()
    index_shards.launch(command(config))
    said = capsys.readouterr().out
    assert "indexed 10 samples of 2 classes in 2 tars" in said and "members not read: 10 .txt" in said
    index_shards.launch(command(config))
    assert "nothing to do" in capsys.readouterr().out


def test_other_tars_are_not_indexed_over_these(theirs: Path, tmp_path: Path) -> None:
    index_shards.launch(command(IndexConfig(shards=(str(theirs),), out=str(tmp_path / "out"))))
    for change, what in (({"shards": (str(theirs / "part-000.tar"),)}, "other tars"), ({"classes": 5}, "classes 2")):
        config = IndexConfig(**{"shards": (str(theirs),), "out": str(tmp_path / "out")} | change)
        with pytest.raises(ValueError, match=f"already indexed with {what}.*delete it"):
            index_shards.launch(command(config))
