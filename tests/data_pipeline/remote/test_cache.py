"""Remote shards are local files: verified, fetched once per node, never over the cache's size, nothing half-written."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_files import FILE, RemoteFile, fetched, hasty_cache, remote_file
from shard_server import ShardServer, shard_server
from workers import ended_well, fork, kill, wait_for

from data_pipeline.files.damage import DamagedData
from data_pipeline.remote import cache as cache_module
from data_pipeline.remote import open as remote_open
from data_pipeline.remote.cache import CacheConfig, ShardCache
from data_pipeline.remote.open import RemoteError

OTHERS = {f"f{seed}": remote_file(seed=seed) for seed in range(1, 9)}


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with shard_server(a=FILE.content, **{name: file.content for name, file in OTHERS.items()}) as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_open, "FIRST_PAUSE", 0.01)


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return hasty_cache(tmp_path / "cache")


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.config.path.iterdir() if path.suffix != ".lock" and path.name != ".lock"}


def parts(cache: ShardCache) -> list[Path]:
    return list(cache.config.path.glob(".*.tmp-*"))


def room_for(number: int) -> dict[str, float]:
    return {"max_gib": (number + 0.5) * FILE.size / 2**30}


def hang(cache: ShardCache, server: ShardServer, name: str, file: RemoteFile) -> int:
    """A process that has room for a file and waits for a server that is silent."""
    server.faults[name] += ["silent"]
    patient = ShardCache(CacheConfig(folder=cache.config.folder, max_gib=cache.config.max_gib, stall_seconds=60))
    child = fork(lambda: fetched(patient, server.url(name), file))
    wait_for(lambda: server.count(name) == 1)
    return child


def test_a_shard_is_fetched_once_and_kept_under_its_hash(server: ShardServer, cache: ShardCache) -> None:
    for copy in (cache, pickle.loads(pickle.dumps(cache))):
        assert fetched(copy, server.url("a?key=1"), FILE) == FILE.content
        copy.fetch_unless_claimed(server.url("a"), **FILE.expected)
    assert server.count("a") == 1 and names(cache) == {FILE.sha256}


def test_a_copy_of_another_size_or_kind_is_fetched_again(server: ShardServer, cache: ShardCache) -> None:
    fetched(cache, server.url("a"), FILE)
    path = cache.config.path / FILE.sha256
    os.truncate(path, 7)
    assert fetched(cache, server.url("a"), FILE) == FILE.content
    mine = cache.config.path / "mine"
    path.rename(mine)
    path.symlink_to(mine)
    assert fetched(cache, server.url("a"), FILE) == FILE.content
    assert mine.exists() and not path.is_symlink() and server.count("a") == 3


def test_wrong_bytes_are_fetched_again_once(server: ShardServer, cache: ShardCache) -> None:
    server.faults["a"] += ["wrong"]
    assert fetched(cache, server.url("a"), FILE) == FILE.content
    for fault, expected in {"wrong": "sha256 is .*, expected", "endless": "more than 300000 bytes"}.items():
        cache = hasty_cache(cache.config.path / fault)
        server.always["a"] = fault
        with pytest.raises(DamagedData, match=f"/a: {expected}.*, twice; copy or pack it again") as caught:
            fetched(cache, server.url("a?CANARY"), FILE)
        assert "CANARY" not in str(caught.value) and not names(cache)


def test_a_shard_that_no_index_knows(server: ShardServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.fetch_new(server.url("a")) == cache.config.path / FILE.sha256
    assert names(cache) == {FILE.sha256} and fetched(cache, server.url("a"), FILE) == FILE.content
    assert cache.sizes_of([server.url("a")] * 40) == [FILE.size] * 40
    with pytest.raises(FileNotFoundError, match="/b: no such file"):
        cache.fetch_new(server.url("b"))
    monkeypatch.setattr(cache_module, "MAX_NEW_BYTES", 1000)
    with pytest.raises(ValueError, match="300000 bytes, a shard has at most 1000"):
        cache.fetch_new(server.url("a"))


def test_processes_of_a_node_fetch_a_shard_once(server: ShardServer, cache: ShardCache) -> None:
    children = [fork(lambda: fetched(cache, server.url("a"), FILE)) for _ in range(4)]
    assert [ended_well(child) for child in children] == [True] * 4
    assert server.count("a") == 1 and names(cache) == {FILE.sha256}


def test_without_locks_every_process_still_gets_its_shards(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    cache = hasty_cache(tmp_path / "cache", **room_for(4))

    def read() -> None:
        for name, file in OTHERS.items():
            assert fetched(cache, server.url(name), file) == file.content

    children = [fork(read) for _ in range(3)]
    assert [ended_well(child) for child in children] == [True] * 3
    assert not parts(cache)


def test_a_download_whose_process_dies_is_taken_over(server: ShardServer, cache: ShardCache) -> None:
    child = hang(cache, server, "a", FILE)
    cache.fetch_unless_claimed(server.url("a"), **FILE.expected)  # which does not wait for the other
    assert not (cache.config.path / FILE.sha256).exists() and len(parts(cache)) == 1
    threading.Timer(0.1, kill, [child]).start()
    assert fetched(cache, server.url("a"), FILE) == FILE.content
    assert names(cache) == {FILE.sha256}  # and what the dead process left is gone


def test_the_least_recently_used_gives_way_and_stays_readable(server: ShardServer, tmp_path: Path) -> None:
    cache = hasty_cache(tmp_path / "cache", **room_for(2))
    first, second, third = list(OTHERS.items())[:3]
    (cache.config.path).mkdir(mode=0o700)
    (cache.config.path / "thesis.tex").write_bytes(bytes(10**6))  # what is not of the cache is left alone
    fetched(cache, server.url(first[0]), first[1])
    in_use = cache.open(server.url(second[0]), **second[1].expected)
    fetched(cache, server.url(first[0]), first[1])
    fetched(cache, server.url(third[0]), third[1])
    assert names(cache) == {first[1].sha256, third[1].sha256, "thesis.tex"}
    assert os.pread(in_use, FILE.size, 0) == second[1].content
    os.close(in_use)


def test_the_cache_never_grows_over_its_size(server: ShardServer, tmp_path: Path) -> None:
    cache = hasty_cache(tmp_path / "cache", **room_for(3))
    for name, file in OTHERS.items():
        assert fetched(cache, server.url(name), file) == file.content
        assert sum(path.stat().st_size for path in cache.config.path.iterdir()) <= cache.config.max_bytes
    assert names(cache) == {file.sha256 for file in list(OTHERS.values())[-3:]}
    with pytest.raises(ValueError, match="a shard of 2000000 bytes does not fit; raise it"):
        cache.open(server.url("a"), size=2_000_000, sha256="0" * 64)


def test_downloads_under_way_take_room_until_they_end(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LONGEST_PAUSE", 0.1)
    cache = hasty_cache(tmp_path / "cache", retries=0, **room_for(1))
    child = hang(cache, server, "a", FILE)
    with pytest.raises(ValueError, match="data.cache.max_gib is .*, too little for all shards fetched at once"):
        fetched(cache, server.url("f1"), OTHERS["f1"])
    monkeypatch.setattr(cache_module, "LONGEST_PAUSE", 30.0)
    threading.Timer(0.1, kill, [child]).start()
    assert fetched(cache, server.url("f1"), OTHERS["f1"]) == OTHERS["f1"].content
    assert names(cache) == {OTHERS["f1"].sha256}


def test_a_lock_does_not_outlive_its_download_in_a_forked_child(server: ShardServer, cache: ShardCache) -> None:
    """As data workers are, that are forked while a thread fetches a shard."""
    server.faults["a"] += ["stall"]
    thread = threading.Thread(target=fetched, args=(cache, server.url("a"), FILE))
    thread.start()
    wait_for(lambda: server.count("a") == 1)
    child = fork(lambda: time.sleep(60))  # has the lock's file open
    thread.join()
    cache.drop(FILE.sha256)
    start = time.monotonic()
    assert fetched(cache, server.url("a"), FILE) == FILE.content
    assert time.monotonic() - start < 20
    kill(child)


def test_a_stopped_process_is_given_up(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "LONGEST_PAUSE", 0.1)
    cache = hasty_cache(tmp_path / "cache", retries=0)
    child = hang(cache, server, "a", FILE)
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(TimeoutError, match=f"another process holds {FILE.sha256} and does nothing; end it"):
        fetched(cache, server.url("a"), FILE)
    kill(child)


def test_a_full_disk_is_named(server: ShardServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '.*/{FILE.sha256}'") as caught:
        fetched(cache, server.url("a?CANARY"), FILE)
    assert caught.value.errno == errno.ENOSPC and not isinstance(caught.value, RemoteError) and not names(cache)


def test_the_folder_is_for_its_owner_alone(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(hasty_cache(tmp_path / "made"), server.url("a"), FILE)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "made")
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, reason in {"link": "a symbolic link", "file": "which is a file", "open": "run chmod go-w"}.items():
        with pytest.raises(ValueError, match=f"data.cache.folder is .*/{name}, .*{reason}"):
            fetched(hasty_cache(tmp_path / name), server.url("a"), FILE)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        fetched(hasty_cache(tmp_path / "made"), server.url("a"), FILE)


@pytest.mark.parametrize(
    "name, value", [("max_gib", 0), ("stall_seconds", 0), ("retries", -1), ("ahead", -1), ("folder", "s3://b/c")]
)
def test_impossible_settings_are_refused(name: str, value: float | str) -> None:
    with pytest.raises(ValueError, match=f"data.cache.{name} is .*; it must be"):
        CacheConfig(**{name: value})


def test_the_folder_is_where_caches_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert CacheConfig().path == Path("/home/me/.cache/nextscale/shards")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert CacheConfig().path == Path("/scratch/me/nextscale/shards")
    assert CacheConfig(folder="~/x").path == Path("/home/me/x")
