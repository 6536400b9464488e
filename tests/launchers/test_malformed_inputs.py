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
from foreign_shards import write_theirs
from malformed_shards import INDEXES, SHARDS, TARS, copy_codes
from project import single_error
from shard_mutations import make_images
from tiny import Study

import launchers.setup.config_files as config_files

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


TRAIN = ("train", "--config", "d2.yaml")
# variables, command line, exit code, what the line says
ENVIRONMENTS: dict[str, tuple[dict[str, str], tuple[str, ...], int, str]] = {
    "a rank in words": ({"RANK": "first"}, TRAIN, 64, "RANK=first"),
    "a rank without a world": ({"RANK": "0"}, TRAIN, 64, "launchers set all three to numbers"),
    "a world of none": ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, TRAIN, 64, "WORLD_SIZE"),
    "a rank beyond the world": ({"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, TRAIN, 64, "RANK"),
    "a node of none": (
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, TRAIN, 64, "LOCAL_WORLD_SIZE=0"
    ),
    "a run folder that is a file": ({}, (*TRAIN, "run=d2.yaml"), 64, "d2.yaml"),
    "a run folder in a file": ({}, (*TRAIN, "run=d2.yaml/run"), 64, "d2.yaml"),
    "a run folder where none can be made": ({}, (*TRAIN, "run=/proc/run"), 64, "/proc/run"),
    "output in a file": ({}, ("index_shards", "--shards", "a.tar", "--out", "d2.yaml/out"), 64, "d2.yaml"),
    "output that is a file": ({}, ("index_shards", "--shards", "a.tar", "--out", "d2.yaml"), 64, "is a file"),
    "output where none can be made": ({}, ("index_shards", "--shards", "a.tar", "--out", "/proc/out"), 64, "/proc/"),
    "a config that is a folder": ({}, ("train", "--config", "."), 64, "config"),
    "a config that is a device": ({}, ("train", "--config", "/dev/zero"), 64, "/dev/zero"),
    "data that is a file": ({}, ("verify_shards", "d2.yaml"), 64, "d2.yaml"),
    "an s3 address without a bucket": ({}, ("verify_shards", "s3://"), 64, "s3://"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_impossible_environment(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variables, command, code, reason = ENVIRONMENTS[name]
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "d2.yaml").write_text(config_files.to_yaml(study.train_config("malformed")))
    write_theirs(tmp_path / "a.tar", make_images(2))
    line, _ = fail(*command, code=code, folder=tmp_path)
    assert reason in line
