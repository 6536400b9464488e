"""A folder is whole or absent, and what is not as it was written shows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from malformed_checkpoints import CHECKPOINTS, cut
from peak_memory import BOUND, peak_memory

from data_pipeline.files.strict_json import MAX_BYTES
from training.checkpoints.commit import (
    DamagedCheckpoint,
    candidates,
    content_damage,
    folder_name,
    forget_old,
    latest_checkpoint,
    make_room,
    publish,
    read_manifest,
    sealed,
    set_aside,
    structural_damage,
    write_file,
)

CONTENT = b"0123456789" * 20


def manifest_of(step: int, files: dict[str, Any]) -> dict[str, Any]:
    facts = {"format": 2, "step": step, "samples_seen": 8 * step, "useful_seconds": 1.5, "world_size": 1}
    return {**facts, "model": {}, "identity": {}, "config": {}, "engines": {"model": {}}, "files": files}


def write(root: Path, step: int, before_commit: Callable[[Path], object] = lambda folder: None) -> Path:
    """A committed folder of two files."""
    temporary, final = root / f".tmp-{step}", root / folder_name(step)
    make_room(root, temporary)
    files = {name: write_file(temporary / name, CONTENT) for name in ("a.bin", "b/c.bin")}
    before_commit(temporary)
    publish(temporary, final, manifest_of(step, files))
    return final


def test_everything_is_on_disk_before_the_rename_that_commits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        forced.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        forced.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    write(tmp_path, 7)
    files = [".tmp-7/a.bin", ".tmp-7/b/c.bin", ".tmp-7/manifest.json"]
    assert forced[:3] == files and sorted(forced[3:5]) == [".tmp-7", ".tmp-7/b"] and forced[5:] == ["renamed"]


def test_the_hash_is_of_what_was_meant_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes the bytes and loses one is found out."""
    file = tmp_path / "a.bin"
    monkeypatch.setattr(os, "fsync", lambda descriptor: file.write_bytes(CONTENT[:-1] + b"?"))
    entry = write_file(file, CONTENT)
    assert "damaged (sha256)" in content_damage(tmp_path, {"files": {"a.bin": entry}}, ["a.bin"])


@pytest.mark.parametrize(
    "lose", [lambda folder: (folder / "b/c.bin").unlink(), lambda folder: cut(folder / "b/c.bin", keep=0.5)]
)
def test_a_file_that_rank_zero_does_not_see_whole_is_noticed_before_the_commit(
    tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    with pytest.raises(ValueError, match=r"c.bin was written but is not seen by rank 0; .*on shared storage"):
        write(tmp_path, 1, before_commit=lose)
    assert candidates(tmp_path) == []


def test_the_newest_comes_first_and_rubbish_does_not_count(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / ".tmp-step-00000200").mkdir()
    (tmp_path / "step-00000300").write_text("a file")
    assert [path.name for path in candidates(tmp_path)] == ["step-00000100", "step-00000010", "step-00000009"]


def test_what_is_set_aside_is_no_candidate_and_not_lost(tmp_path: Path) -> None:
    for number in range(2):
        aside = set_aside(write(tmp_path, 3))
        assert aside.name == f".damaged-step-00000003-{number}" and (aside / "a.bin").is_file()
    assert candidates(tmp_path) == []


def test_old_ones_are_forgotten_but_the_kept_the_round_and_the_newest(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step)
    (tmp_path / folder_name(1) / "keep").touch()
    forget_old(tmp_path, keep=2, keep_every=3)
    assert [int(path.name[-1]) for path in candidates(tmp_path)] == [7, 6, 5, 3, 1]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_malformed_checkpoint_is_damage_in_one_line(tmp_path: Path, name: str) -> None:
    damage_it, reason = CHECKPOINTS[name]
    folder = write(tmp_path / "checkpoints", 1)
    outside = tmp_path / "outside.bin"
    outside.write_bytes(CONTENT)
    damage_it(folder)
    start = time.monotonic()
    line = structural_damage(folder)
    assert reason in line and line.startswith(str(folder)) and "\n" not in line and len(line) < 400
    assert time.monotonic() - start < 5
    set_aside(folder)
    assert outside.read_bytes() and not candidates(tmp_path / "checkpoints")


def test_a_large_manifest_is_read_within_the_memory(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(b'{"step": [' + b"[]," * (MAX_BYTES // 3 - 20) + b"[]]}")
    assert peak_memory(lambda: structural_damage(folder)) < BOUND


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "a/../b", "..", "a//b", "a\\b", "", "a/b/c/d", ".hidden", "x\n", "manifest.json"],
)
def test_files_of_a_manifest_never_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(sealed(manifest_of(1, {name: {"bytes": 1, "sha256": "0" * 64}})))
    with pytest.raises(DamagedCheckpoint, match="is sealed, but lists a file"):
        read_manifest(folder)


def test_what_people_put_beside_checkpoints_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    """A copy, a back-up, a link, a folder without a seal: keep=1 leaves them, and the newest of the run."""
    run = [write(tmp_path, step) for step in (1, 2, 3)]
    theirs = ["step-best", "step-00000003.bak", "step-00000002-copy"]
    for name in theirs:
        shutil.copytree(run[1], tmp_path / name)
    (tmp_path / "step-99999999").symlink_to(run[2])
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "weights.bin").write_bytes(CONTENT)
    shutil.copytree(run[0], tmp_path / "step-00000009")  # the seal is that of step 1
    assert latest_checkpoint(tmp_path) == run[2]
    forget_old(tmp_path, keep=1, keep_every=0)
    stay = [*theirs, "step-99999999", "step-00000007", "step-00000009", run[2].name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    assert run[2] in candidates(tmp_path)
    assert not {tmp_path / name for name in [*theirs, "step-99999999"]} & set(candidates(tmp_path))
