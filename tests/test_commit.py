"""A folder is whole or absent, and what is not as it was written shows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from training import seams
from training.commit import (
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


def write(root: Path, step: int, content: bytes = b"0123456789" * 20) -> Path:
    """A committed folder of two files."""
    temporary, final = root / f".tmp-{step}", root / folder_name(step)
    make_room(root, temporary)
    files = {name: write_file(temporary / name, content, "share") for name in ("a.bin", "b/c.bin")}
    publish(temporary, final, {"format": 2, "step": step, "files": files})
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
        publish(temporary, tmp_path / folder_name(1), {"format": 2, "step": 1, "files": files})
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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"format": 2, "seal": ""}'])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCheckpoint):
        read_manifest(folder)
    assert structural_damage(folder).startswith(str(folder))


def test_another_version_is_no_damage_but_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_bytes(sealed(read_manifest(folder) | {"format": 3}))
    with pytest.raises(ValueError, match="checkpoint format 3, this version reads 2") as caught:
        structural_damage(folder)
    assert not isinstance(caught.value, DamagedCheckpoint)
