"""Files: complete or absent under every failure, and known by their sha256."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.files.atomic import atomic_file, atomic_folder, file_sha256, refuse_occupied


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.json"


def test_a_file_appears_only_when_complete(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"whole")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_until_then_readers_see_the_old_content(path: Path) -> None:
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_changes_nothing(path: Path, error: type[BaseException]) -> None:
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_name_stands_for_content_that_is_on_disk_already(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=original: (calls.append(n), f(*args))[1])
    with atomic_file(path) as file:
        file.write(b"whole")
    assert calls == ["fsync", "replace", "fsync"]  # the content, its name, and the folder that holds the name


def test_a_folder_appears_only_when_complete_also_in_the_place_of_an_empty_one(tmp_path: Path) -> None:
    for name in ("new", "deep/er", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with atomic_folder(tmp_path / name) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(name)
            assert not (tmp_path / name / "sub").exists()
        assert (tmp_path / name / "sub" / "file").read_text() == name
        assert [path.name for path in (tmp_path / name).parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_whose_writer_fails_never_appears(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path, path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty; choose another folder"), atomic_folder(tmp_path):
        pytest.fail("asked to write")
    with pytest.raises(ValueError, match="index.json: is a file"):
        refuse_occupied(path)
    assert path.read_bytes() == b"mine"
    refuse_occupied(tmp_path / "free")


def test_sha256_is_the_published_one(path: Path) -> None:
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
