"""Files: complete or absent under every failure, and known by their sha256."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.files import atomic_file, file_sha256


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


def test_sha256_is_the_published_one(path: Path) -> None:
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
