"""A folder is whole or absent, and what is not as it was written shows."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from malformed_checkpoints import CHECKPOINTS
from peak_memory import BOUND, peak_memory

from data_pipeline.files.strict_json import MAX_BYTES
from training import seams
from training.checkpoints.commit import (
    DamagedCheckpoint,
    candidates,
    content_damage,
    folder_name,
    forget_old,
    make_room,
    publish,
    read_manifest,
    sealed,
    set_aside,
    structural_damage,
    write_file,
)


def manifest_of(step: int, files: dict[str, Any]) -> dict[str, Any]:
    facts = {"format": 2, "step": step, "samples_seen": 8 * step, "useful_seconds": 1.5, "world_size": 1}
    return {**facts, "model": {}, "identity": {}, "config": {}, "engines": {"model": {}}, "files": files}


def write(root: Path, step: int, content: bytes = b"0123456789" * 20) -> Path:
    """A committed folder of two files."""
    temporary, final = root / f".tmp-{step}", root / folder_name(step)
    make_room(root, temporary)
    files = {name: write_file(temporary / name, content, "share") for name in ("a.bin", "b/c.bin")}
    publish(temporary, final, manifest_of(step, files))
    return final


def damage(folder: Path) -> str:
    found = structural_damage(folder)
    if found:
        return found
    manifest = read_manifest(folder)
    return content_damage(folder, manifest, list(manifest["files"]))


def test_what_was_committed_is_sound_and_leaves_no_temporary_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    assert damage(folder) == "" and list(tmp_path.iterdir()) == [folder]
    assert read_manifest(folder)["step"] == 7


def test_every_flipped_bit_shows(tmp_path: Path) -> None:
    folder = write(tmp_path, 7)
    files = [folder / name for name in ("a.bin", "b/c.bin", "manifest.json")]
    chance = random.Random(0)
    for _ in range(300):
        file = chance.choice(files)
        good = file.read_bytes()
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        assert damage(folder), file
        file.write_bytes(good)
    assert damage(folder) == ""


def test_the_hash_is_of_what_was_meant_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes the bytes and loses one is found out."""
    file = tmp_path / "step-00000001" / "a.bin"

    def lose_a_byte(site: str, value: Any) -> Any:
        if site == "checkpoint.share.written":
            file.write_bytes(file.read_bytes()[:-1] + b"?")

    seams.install(lose_a_byte)
    entry = write_file(file, b"0123456789", "share")
    seams.install(None)
    assert "damaged (sha256)" in content_damage(file.parent, {"files": {"a.bin": entry}}, ["a.bin"])


def test_a_file_that_another_rank_wrote_elsewhere_is_noticed_before_the_commit(tmp_path: Path) -> None:
    temporary = tmp_path / ".tmp-1"
    make_room(tmp_path, temporary)
    files = {"state/share.bin": {"bytes": 3, "sha256": "0" * 64}}
    with pytest.raises(ValueError, match="not seen by rank 0; the run folder must be on shared storage"):
        publish(temporary, tmp_path / folder_name(1), manifest_of(1, files))
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
    for step in (1, 2, 3, 4, 5, 6, 7):
        (write(tmp_path, step) / "keep").touch() if step == 1 else write(tmp_path, step)
    forget_old(tmp_path, keep=2, keep_every=3)
    assert [int(path.name[-1]) for path in candidates(tmp_path)] == [7, 6, 5, 3, 1]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_malformed_checkpoint_is_damage_in_one_line(tmp_path: Path, name: str) -> None:
    damage_it, reason = CHECKPOINTS[name]
    folder = write(tmp_path / "checkpoints", 1)
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"0123456789" * 20)
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


def test_files_of_a_manifest_never_lead_out_of_its_folder(tmp_path: Path) -> None:
    above = ("../../x", "/etc/passwd", "a/../b", "..", "a//b", "a\\b", "", "a/b/c/d", ".hidden", "x\n", "manifest.json")
    for name in above:
        folder = write(tmp_path, 1)
        entry = {"bytes": 1, "sha256": "0" * 64}
        (folder / "manifest.json").write_bytes(sealed(manifest_of(1, {name: entry})))
        with pytest.raises(DamagedCheckpoint, match="is sealed, but lists a file"):
            read_manifest(folder)
        set_aside(folder)


def test_another_version_is_no_damage_but_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(sealed(read_manifest(folder) | {"format": 3}))
    with pytest.raises(ValueError, match="checkpoint format 3, this version reads 2") as caught:
        structural_damage(folder)
    assert not isinstance(caught.value, DamagedCheckpoint)
