"""Patience: what fails and may pass is asked for again, what stalls is given up, and nothing lasts forever."""

from __future__ import annotations

import os
import pickle
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_files import FILE, remote_file
from shard_server import ShardServer, shard_server

from data_pipeline.remote import downloads
from data_pipeline.remote.connections import PIECE_BYTES, Interrupted
from data_pipeline.remote.downloads import Downloads, RemoteError, Tries, WrongSize


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with shard_server(a=FILE.content, empty=b"") as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)


def hasty(retries: int = 4, stall_seconds: float = 0.15) -> Downloads:
    return Downloads(stall_seconds=stall_seconds, retries=retries)


def copy(reads: Downloads, url: str, path: Path, size: int = FILE.size) -> tuple[bytes, str]:
    with path.open("wb") as file:
        digest = reads.copy(url, file.fileno(), size=size)
    return path.read_bytes(), digest


@pytest.mark.parametrize(
    "fault", ["ok", "500", "503", "429", "reset", "cut", "stall", "silent", "drip", "no-range", "no-length"]
)
def test_a_fault_that_passes_is_not_noticed(server: ShardServer, tmp_path: Path, fault: str) -> None:
    server.faults["a"] += [fault, fault]
    assert copy(hasty(), server.url("a"), tmp_path / "copy") == (FILE.content, FILE.sha256)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("503", "the server answers 503"),
        ("cut", "the connection ended before all was sent"),
        ("stall", r"next to nothing came for 0\.15 s"),
        ("silent", r"next to nothing came for 0\.15 s"),
        ("drip", r"next to nothing came for 0\.15 s"),
    ],
)
def test_a_fault_that_stays_ends_in_one_line(server: ShardServer, tmp_path: Path, fault: str, reason: str) -> None:
    server.always["a"] = fault
    start = time.monotonic()
    with pytest.raises(RemoteError, match=f"not delivered in 3 tries, at last: {reason}; look at") as caught:
        copy(hasty(retries=2), server.url("a?key=CANARY"), tmp_path / "copy")
    assert time.monotonic() - start < 3
    assert "CANARY" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_goes_on_where_it_broke_off(server: ShardServer, tmp_path: Path) -> None:
    server.faults["a"] += ["reset"]
    server.reset_after = 1.0
    copy(hasty(stall_seconds=5.0), server.url("a"), tmp_path / "copy")
    first, second = (request.byte_range for request in server.requests)
    assert first == "" and second == f"bytes={FILE.size // 2}-"
    assert server.sent == FILE.size


def test_a_file_begins_anew_if_the_server_ignores_ranges_or_has_another_by_then(
    server: ShardServer, tmp_path: Path
) -> None:
    server.faults["a"] += ["cut", "no-range"]
    assert copy(hasty(), server.url("a"), tmp_path / "copy") == (FILE.content, FILE.sha256)
    other = remote_file(seed=1)
    server.faults["a"] += ["cut"]
    server.replacements["a"] = other.content
    assert copy(hasty(), server.url("a"), tmp_path / "copy") == (other.content, other.sha256)


def test_progress_renews_patience(server: ShardServer, tmp_path: Path) -> None:
    large = remote_file(4 * PIECE_BYTES)
    server.files["large"] = large.content
    for _ in range(2):
        server.faults["large"] += ["500", "cut"]
    with pytest.raises(RemoteError, match="answers 500"):
        copy(hasty(0, 5.0), server.url("large"), tmp_path / "copy", large.size)
    server.faults["large"].popleft()
    found = copy(hasty(1, 5.0), server.url("large"), tmp_path / "copy", large.size)
    assert found == (large.content, large.sha256)


def test_pauses_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(time, "sleep", pauses.append)
    state = random.getstate()
    tries = Tries("http://host/a", 12)
    for _ in range(12):
        tries.failed(Interrupted("x"))
    with pytest.raises(RemoteError, match="in 13 tries, at last: x"):
        tries.failed(Interrupted("x"))
    longest = [min(0.2 * 2**number, 30.0) for number in range(12)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert random.getstate() == state  # which belongs to the training


@pytest.mark.parametrize("size", [FILE.size - 1, FILE.size + 1])
@pytest.mark.parametrize("fault", ["ok", "endless"])
def test_another_size_is_told_and_never_written(server: ShardServer, tmp_path: Path, size: int, fault: str) -> None:
    server.always["a"] = fault
    with pytest.raises(WrongSize):
        copy(hasty(), server.url("a"), tmp_path / "copy", size)
    assert (tmp_path / "copy").stat().st_size <= size and server.sent < 64 * 2**20


def test_a_small_file_is_read_up_to_its_limit(server: ShardServer) -> None:
    assert hasty().read_small(server.url("a"), max_bytes=FILE.size) == FILE.content
    assert hasty().read_small(server.url("empty"), max_bytes=0) == b""
    assert [hasty().size_of(server.url(name)) for name in ("a", "empty")] == [FILE.size, 0]
    server.faults["a"] += ["cut", "stall", "no-length"]
    assert hasty().read_small(server.url("a"), max_bytes=FILE.size) == FILE.content
    for fault in ("ok", "endless"):
        server.always["a"] = fault
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            hasty().read_small(server.url("a"), max_bytes=1000)


def test_memory_stays_bounded_whatever_is_sent(server: ShardServer, tmp_path: Path) -> None:
    server.always["a"] = "endless"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WrongSize):
        copy(hasty(), server.url("a"), tmp_path / "copy", 100 * 2**20)
    with pytest.raises(RemoteError, match="does not say how large it is"):
        hasty().size_of(server.url("a"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 48 * 2**10  # KiB; a body of 100 MiB and more


def test_a_full_disk_is_not_a_fault_of_the_server(server: ShardServer) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left") as caught:
        hasty().copy(server.url("a"), descriptor, size=FILE.size)
    os.close(descriptor)
    assert not isinstance(caught.value, RemoteError) and len(server.requests) == 1


def test_it_may_be_sent_to_another_process_after_use(server: ShardServer) -> None:
    reads = hasty()
    reads.size_of(server.url("a"))
    assert pickle.loads(pickle.dumps(reads)).size_of(server.url("a")) == FILE.size
