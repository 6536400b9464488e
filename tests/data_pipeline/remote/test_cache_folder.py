"""A folder that many processes share: one writer at a time, never over its size, nothing half-written, nothing lost."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest
from workers import ended_well, fork, kill, wait_for

from data_pipeline.remote.cache_folder import CacheFolder

CONTENTS = {hashlib.sha256(content).hexdigest(): content for content in (b"a" * 400, b"b" * 400, b"c" * 400)}
FIRST, SECOND, THIRD = CONTENTS


def cache(folder: Path, *, max_bytes: int = 1000, patience: float = 5.0) -> CacheFolder:
    made = CacheFolder(folder / "cache", max_bytes=max_bytes, patience=patience)
    made.create()
    return made


def put(folder: CacheFolder, name: str) -> None:
    with folder.claim(name) as part:
        folder.make_room(part, len(CONTENTS[name]))
        os.pwrite(part.descriptor, CONTENTS[name], 0)
        part.keep(name)


def names(folder: CacheFolder) -> set[str]:
    return {path.name for path in folder.folder.iterdir()} - {".lock"}


def test_what_was_kept_is_found_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = cache(tmp_path)
    put(folder, FIRST)
    with folder.claim(SECOND) as part:
        os.pwrite(part.descriptor, b"half", 0)
    path = folder.find(FIRST, 400)
    assert path is not None and path.read_bytes() == CONTENTS[FIRST] and names(folder) == {FIRST}


def test_a_copy_of_another_size_or_kind_is_removed(tmp_path: Path) -> None:
    folder = cache(tmp_path)
    put(folder, FIRST)
    assert folder.find(FIRST, 401) is None and not names(folder)
    (tmp_path / "mine").write_bytes(b"a" * 400)
    (folder.folder / FIRST).symlink_to(tmp_path / "mine")
    assert folder.find(FIRST, 400) is None and not names(folder) and (tmp_path / "mine").exists()


def test_the_least_recently_used_gives_way(tmp_path: Path) -> None:
    folder = cache(tmp_path)
    put(folder, FIRST)
    put(folder, SECOND)
    with (folder.folder / SECOND).open("rb") as in_use:
        folder.find(FIRST, 400)
        put(folder, THIRD)
        assert names(folder) == {FIRST, THIRD}
        assert in_use.read() == CONTENTS[SECOND]


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    folder = cache(tmp_path)
    (folder.folder / "thesis.tex").write_bytes(b"x" * 5000)
    for name in CONTENTS:
        put(folder, name)
    assert "thesis.tex" in names(folder)


def test_downloads_under_way_take_room_too(tmp_path: Path) -> None:
    folder = cache(tmp_path, patience=0.1)
    with folder.claim(FIRST) as first, folder.claim(SECOND) as second, folder.claim(THIRD) as third:
        folder.make_room(first, 400)
        folder.make_room(second, 400)
        with pytest.raises(ValueError, match="data.cache.max_gib is .*, too little for all shards fetched at once"):
            folder.make_room(third, 400)
    with folder.claim(THIRD) as third:
        folder.make_room(third, 1000)
        with pytest.raises(ValueError, match="a shard of 1001 bytes does not fit"):
            folder.make_room(third, 1001)


def test_room_is_waited_for(tmp_path: Path) -> None:
    folder = cache(tmp_path, max_bytes=500)

    def slow() -> None:
        with folder.claim(FIRST) as part:
            folder.make_room(part, 400)
            time.sleep(0.3)
            part.keep(FIRST)

    child = fork(slow)
    wait_for(lambda: folder.is_claimed(FIRST))
    put(folder, SECOND)
    assert ended_well(child) and names(folder) == {SECOND}


def test_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    folder = cache(tmp_path)
    log = tmp_path / "log"

    def want() -> None:
        while folder.find(FIRST, 400) is None:
            with folder.claim(FIRST) as part:
                if not (folder.folder / FIRST).exists():
                    with log.open("a") as file:
                        file.write("written\n")
                    folder.make_room(part, 400)
                    time.sleep(0.1)
                    os.pwrite(part.descriptor, CONTENTS[FIRST], 0)
                    part.keep(FIRST)

    assert all([ended_well(child) for child in [fork(want) for _ in range(6)]])
    assert log.read_text() == "written\n" and names(folder) == {FIRST}


def test_the_part_of_a_dead_writer_is_taken_over_or_removed(tmp_path: Path) -> None:
    folder = cache(tmp_path)

    def die(name: str) -> None:
        with folder.claim(name) as part:
            folder.make_room(part, 400)
            time.sleep(60)

    for name in (FIRST, SECOND):
        child = fork(lambda: die(FIRST))
        wait_for(lambda: folder.is_claimed(FIRST))
        kill(child)
        assert names(folder) == {f"{FIRST}.part"}
        put(folder, name)
        assert names(folder) == {name}
        (folder.folder / name).unlink()


def test_a_lock_does_not_outlive_its_writer_in_a_forked_child(tmp_path: Path) -> None:
    folder = cache(tmp_path, patience=1.0)
    with folder.claim(FIRST) as part:
        child = fork(lambda: time.sleep(60))  # has the same file open
        folder.make_room(part, 400)
    put(folder, FIRST)
    kill(child)


def test_a_stopped_writer_is_given_up(tmp_path: Path) -> None:
    folder = cache(tmp_path, patience=0.2)

    def stop() -> None:
        with folder.claim(FIRST):
            os.kill(os.getpid(), signal.SIGSTOP)

    child = fork(stop)
    wait_for(lambda: folder.is_claimed(FIRST))
    with pytest.raises(TimeoutError, match=f"another process holds {FIRST}.part and does nothing; end it"):
        put(folder, FIRST)
    kill(child)


def test_the_folder_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cache(tmp_path).folder
    assert made.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(made)
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, reason in {"link": "a symbolic link", "file": "which is a file", "open": "run chmod go-w"}.items():
        with pytest.raises(ValueError, match=f"data.cache.folder is .*/{name}, .*{reason}"):
            CacheFolder(tmp_path / name, max_bytes=1, patience=1).create()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        cache(tmp_path)
