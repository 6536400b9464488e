"""Files behind URLs: what may pass is asked for again, what stalls is given up, and nothing is stored without end."""

from __future__ import annotations

import pickle
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_files import FILE, s3_server
from shard_server import ShardServer, faulty_relay, shard_server
from workers import ended_well, fork

from data_pipeline.remote import open as remote_open
from data_pipeline.remote.open import RemoteError, RemoteFiles, WrongSize

SECRET = "CANARY0secret0key"


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with shard_server(a=FILE.content, empty=b"") as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_open, "FIRST_PAUSE", 0.01)


def hasty(retries: int = 4, stall_seconds: float = 0.15) -> RemoteFiles:
    return RemoteFiles(stall_seconds=stall_seconds, retries=retries)


def copy(files: RemoteFiles, url: str, path: Path, size: int = FILE.size) -> bytes:
    with path.open("wb") as file:
        files.copy(url, file, size=size)
    return path.read_bytes()


@pytest.mark.parametrize(
    "fault", ["ok", "500", "503", "429", "reset", "cut", "stall", "silent", "drip", "no-range", "no-length"]
)
def test_a_fault_that_passes_is_not_noticed(server: ShardServer, tmp_path: Path, fault: str) -> None:
    server.faults["a"] += [fault, fault]
    assert copy(hasty(), server.url("a"), tmp_path / "copy") == FILE.content
    server.faults["a"] += [fault]
    assert hasty().read_small(server.url("a"), max_bytes=FILE.size) == FILE.content
    server.faults["a"] += [fault]
    assert hasty().size_of(server.url("a")) == FILE.size


@pytest.mark.parametrize(
    "fault, requests, message",
    [
        ("503", 3, "not delivered in 3 tries, at last: the server answers 503; look at"),
        ("cut", 3, "not delivered in 3 tries, at last: the connection ended before all was sent; look at"),
        ("stall", 3, r"not delivered in 3 tries, at last: next to nothing came for 0\.15 s; look at"),
        ("silent", 3, r"not delivered in 3 tries, at last: next to nothing came for 0\.15 s; look at"),
        ("drip", 3, r"not delivered in 3 tries, at last: next to nothing came for 0\.15 s; look at"),
        ("403", 1, "answers 403, not allowed; put user and password of this host into ~/.netrc"),
        ("401", 1, "~/.netrc"),
        ("400", 1, "answers 400; correct the URL"),
        ("gzip", 1, "sends it compressed"),
        ("to:file:///etc/passwd", 1, "redirects to something that is not http"),
        ("to:ftp://host/a", 1, "redirects to something that is not http"),
        ("to:/a", 10, "redirects in a circle"),
        ("404", 1, "/a: no such file; copy or pack it again"),
        ("410", 1, "/a: no such file; copy or pack it again"),
    ],
)
def test_a_fault_that_stays_is_one_line_without_secrets(
    server: ShardServer, tmp_path: Path, fault: str, requests: int, message: str
) -> None:
    """What may pass is asked for three times, the rest once."""
    server.always["a"] = fault
    start = time.monotonic()
    with pytest.raises(OSError, match=message) as caught:
        copy(hasty(retries=2), server.url("a?key=CANARY"), tmp_path / "copy")
    assert isinstance(caught.value, FileNotFoundError if fault in ("404", "410") else RemoteError)
    assert "CANARY" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.requests) == requests and time.monotonic() - start < 3


def test_content_is_asked_for_as_it_is(server: ShardServer) -> None:
    hasty().read_small(server.url("a?signature=x%2Fy%20z"), max_bytes=FILE.size)
    assert server.requests[-1].headers["Accept-Encoding"] == "identity"
    assert server.requests[-1].path == "/a?signature=x%2Fy%20z"  # to the letter, or the signature would be void
    assert hasty().size_of(server.url("a").replace("http", "HTTP")) == FILE.size
    server.always["b"] = f"to:{server.url('a')}?signature=1%2F2"
    assert hasty().size_of(server.url("b")) == FILE.size
    assert server.requests[-1].path == "/a?signature=1%2F2"


@pytest.mark.parametrize(
    "address, reason",
    [
        ("http://127.0.0.1:1", "not delivered in 2 tries, at last: connection refused; look at"),
        ("http://nowhere.invalid", "not delivered in 2 tries, at last: no such host; look at"),
        ("https://127.0.0.1:{port}", "does not speak https"),
    ],
)
def test_servers_that_are_not_there_are_named(server: ShardServer, address: str, reason: str) -> None:
    with pytest.raises(RemoteError, match=f"/a: .*{reason}") as caught:
        hasty(retries=1).size_of(f"{address.format(port=server.port)}/a?CANARY")
    assert "CANARY" not in str(caught.value)


def test_the_login_of_a_host_is_found_in_netrc(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password CANARY\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    hasty().size_of(server.url("a"))
    assert server.requests[-1].headers["Authorization"].startswith("Basic ")


def test_pauses_double_up_to_a_limit(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote_open, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(time, "sleep", pauses.append)
    state = random.getstate()
    with pytest.raises(RemoteError, match="in 13 tries"):
        hasty(retries=12).size_of("http://127.0.0.1:1/a")
    longest = [min(0.2 * 2**number, 30.0) for number in range(12)]
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
    assert random.getstate() == state  # which belongs to the training


@pytest.mark.parametrize("size", [FILE.size - 1, FILE.size + 1])
@pytest.mark.parametrize("fault", ["ok", "endless", "lie"])
def test_another_size_is_told_and_never_stored(server: ShardServer, tmp_path: Path, size: int, fault: str) -> None:
    server.always["a"] = fault
    with pytest.raises(WrongSize):
        copy(hasty(), server.url("a"), tmp_path / "copy", size)
    assert (tmp_path / "copy").stat().st_size <= size + 2**20 and server.sent < 64 * 2**20


def test_a_small_file_is_read_up_to_its_limit(server: ShardServer) -> None:
    assert hasty().read_small(server.url("empty"), max_bytes=0) == b""
    assert hasty().size_of(server.url("empty")) == 0
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
    with open("/dev/full", "r+b", buffering=0) as file, pytest.raises(OSError, match="No space left") as caught:
        hasty().copy(server.url("a"), file, size=FILE.size)
    assert not isinstance(caught.value, RemoteError) and len(server.requests) == 1


def test_it_may_be_sent_to_another_process_after_use(server: ShardServer) -> None:
    files = hasty()
    assert files.size_of(server.url("a")) == FILE.size
    assert pickle.loads(pickle.dumps(files)).size_of(server.url("a")) == FILE.size


def test_a_forked_child_has_connections_of_its_own(server: ShardServer) -> None:
    """Parent and child read in turn; what the child does to its copies does not disturb the parent."""
    files = hasty(stall_seconds=5.0)
    assert files.size_of(server.url("a")) == FILE.size

    def read() -> None:
        assert files.read_small(server.url("a"), max_bytes=FILE.size) == FILE.content

    child = fork(read)
    read()
    assert ended_well(child)
    assert files.size_of(server.url("a")) == FILE.size
    assert len(server.requests) == 4


def test_libraries_are_imported_at_the_first_remote_access() -> None:
    heavy = "{'fsspec', 'aiohttp', 's3fs', 'botocore'}"
    code = f"import sys, data_pipeline.loading.loader; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_that_has_read_ends_quietly(server: ShardServer) -> None:
    lines = (
        "from data_pipeline.remote.open import RemoteFiles",
        f"print(RemoteFiles(stall_seconds=5, retries=0).size_of({server.url('a')!r}))",
    )
    ended = subprocess.run([sys.executable, "-X", "dev", "-c", "; ".join(lines)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{FILE.size}\n", "")


def test_without_s3fs_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RemoteError, match=r"s3://bucket/a: S3 needs .*: run pip install -e '.\[s3\]' in the checkout$"):
        hasty().size_of("s3://bucket/a")


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The environment of somebody with a login for S3."""
    values = {
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "AKIACANARY",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_s3_is_read_by_signed_requests(login: pytest.MonkeyPatch, server: ShardServer) -> None:
    """The one fast test of S3; those against a whole S3 server are among the faults."""
    server.files["bucket/a/b+ü.tar"] = server.files["bucket/a/b%2B%C3%BC.tar"] = FILE.content
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):  # the second wins
        login.setenv(name, server.url("").rstrip("/"))
        assert hasty().size_of("s3://bucket/a/b+ü.tar") == FILE.size
        assert "X-Amz-Signature=" in server.requests[-1].path
        login.setenv(name, "http://127.0.0.1:1")
    server.headers["x-amz-bucket-region"] = "eu-west-1"
    server.always["bucket/a"] = "301"
    login.setenv("AWS_ENDPOINT_URL_S3", server.url("").rstrip("/"))
    with pytest.raises(RemoteError, match="set AWS_REGION='eu-west-1'"):
        hasty().size_of("s3://bucket/a")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("AWS_ACCESS_KEY_ID", None, "no credentials for S3; set AWS_ACCESS_KEY_ID"),
        ("AWS_PROFILE", "nobody", "ProfileNotFound; correct the bucket, AWS_ENDPOINT_URL_S3"),
        ("AWS_ENDPOINT_URL_S3", "nonsense", "ValueError; correct the bucket, AWS_ENDPOINT_URL_S3"),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", "connection refused"),
    ],
)
def test_a_wrong_login_or_endpoint_is_one_line(
    login: pytest.MonkeyPatch, name: str, value: str | None, message: str
) -> None:
    login.delenv(name) if value is None else login.setenv(name, value)
    with pytest.raises(RemoteError, match=message) as caught:
        hasty(retries=1).size_of("s3://bucket/a/b+c.tar")
    assert "CANARY" not in str(caught.value) and "Signature" not in str(caught.value)


@pytest.mark.faults
def test_an_s3_server_behind_a_bad_network(login: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fifth of the connections breaks, one never answers; every copy is right."""
    with s3_server({"a/b+c.tar": FILE.content}) as port, faulty_relay(port, every=5, stalled={2}) as relay:
        login.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{relay.port}")
        for _ in range(20):  # each with connections of its own
            assert copy(hasty(stall_seconds=0.5), "s3://bucket/a/b+c.tar", tmp_path / "copy") == FILE.content
        for missing in ("s3://bucket/none", "s3://none/a"):
            with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
                hasty(stall_seconds=0.5).size_of(missing)
    assert relay.broken >= 4
