"""The table of malformed inputs: each is one line that names the thing and what to do, with the right exit code.

Within five seconds, without a traceback, and with nothing written. Every row starts a launcher as a user does.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time
from pathlib import Path

import pytest
from malformed_shards import INDEXES, SHARDS, TARS, copy_codes
from project import single_error
from tiny import Study

import launchers.config_files as config_files

SECONDS = 5.0


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def fail(launcher: str, *arguments: str, code: int, folder: Path) -> tuple[str, str]:
    """Run a launcher that must end with `code`, one line on stderr, and no change in `folder`; the line, and stdout."""
    main = importlib.import_module(f"launchers.{launcher}").main
    said, error = io.StringIO(), io.StringIO()
    before, start = listing(folder), time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{launcher}.py", *arguments])
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as left:
            main()
    seconds = time.monotonic() - start
    assert left.value.code == code, (left.value.code, error.getvalue()[-2000:])
    assert seconds < SECONDS and listing(folder) == before
    return single_error(error.getvalue()), said.getvalue()


@pytest.mark.parametrize("name", SHARDS)
def test_a_damaged_shard(study: Study, tmp_path: Path, name: str) -> None:
    damage, reason = SHARDS[name]
    damage(copy_codes(study.folder / "codes/train", tmp_path))
    line, said = fail("verify_shards", "data", code=65, folder=tmp_path)
    assert "named above; copy or pack these shards again" in line
    faults = [text for text in said.splitlines() if text.startswith("fault: ")]
    assert faults and all("shard-000000." in fault for fault in faults)
    assert any(reason in fault for fault in faults), faults


@pytest.mark.parametrize("name", INDEXES)
def test_a_malformed_index(study: Study, tmp_path: Path, name: str) -> None:
    damage, code, reason = INDEXES[name]
    damage(copy_codes(study.folder / "codes/train", tmp_path))
    (tmp_path / "d2.yaml").write_text(config_files.to_yaml(study.train_config("malformed")))
    line, _ = fail("train", "--config", "d2.yaml", "data.train=data", "run=run", code=code, folder=tmp_path)
    assert reason in line and ("data" in line or "/dev/zero" in line) and ";" in line
    assert "secret" not in line


@pytest.mark.parametrize("name", TARS)
def test_a_malformed_tar_of_somebody_else(tmp_path: Path, name: str) -> None:
    damage, code, reason = TARS[name]
    damage(tmp_path)
    line, _ = fail("index_shards", "--shards", "theirs.tar", "--out", "out", code=code, folder=tmp_path)
    assert reason in line and "theirs.tar" in line
