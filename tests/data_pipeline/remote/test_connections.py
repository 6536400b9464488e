"""One request at a time: what each answer of a server means, over http and from S3."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_files import FILE, hasty_cache, s3_server
from shard_server import ShardServer, faulty_relay, shard_server

from data_pipeline.remote.connections import Connections, Interrupted
from data_pipeline.remote.remote import RemoteError, ShardCache

SECRET = "CANARY0secret0key"


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with shard_server(a=FILE.content, empty=b"") as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return hasty_cache(tmp_path / "cache", retries=1)


def test_content_is_asked_for_as_it_is(server: ShardServer, cache: ShardCache) -> None:
    cache.read_small(server.url("a?signature=x%2Fy%20z"), max_bytes=FILE.size)
    assert server.requests[-1].headers["Accept-Encoding"] == "identity"
    assert server.requests[-1].path == "/a?signature=x%2Fy%20z"  # to the letter, or the signature would be void
    assert cache.size_of(server.url("a").replace("http", "HTTP")) == FILE.size


@pytest.mark.parametrize(
    "fault, message",
    [
        ("403", "answers 403, not allowed; put user and password of this host into ~/.netrc"),
        ("401", "~/.netrc"),
        ("400", "answers 400; correct the URL"),
        ("gzip", "sends it compressed"),
        ("to:file:///etc/passwd", "redirects to something that is not http"),
        ("to:ftp://host/a", "redirects to something that is not http"),
        ("to:/a", "redirects in a circle"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    server: ShardServer, cache: ShardCache, fault: str, message: str
) -> None:
    server.always["a"] = fault
    with pytest.raises(RemoteError, match=message) as caught:
        cache.size_of(server.url("a?key=CANARY"))
    assert "CANARY" not in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.requests) == (10 if fault == "to:/a" else 1)


@pytest.mark.parametrize("status", ["404", "410"])
def test_a_missing_file_is_told_at_once(server: ShardServer, cache: ShardCache, status: str) -> None:
    server.always["a"] = status
    with pytest.raises(FileNotFoundError, match="/a: no such file; copy or pack it again"):
        cache.read_small(server.url("a?key=CANARY"), max_bytes=9)
    assert len(server.requests) == 1


def test_redirects_to_http_are_followed(server: ShardServer, cache: ShardCache) -> None:
    server.always["b"] = f"to:{server.url('a')}?signature=1%2F2"
    assert cache.size_of(server.url("b")) == FILE.size
    assert server.requests[-1].path == "/a?signature=1%2F2"


@pytest.mark.parametrize("host, reason", [("127.0.0.1:1", "connection refused"), ("nowhere.invalid", "no such host")])
def test_servers_that_are_not_there_are_named(cache: ShardCache, host: str, reason: str) -> None:
    with pytest.raises(RemoteError, match=f"/a: not delivered in 2 tries, at last: {reason}; look at") as caught:
        cache.size_of(f"http://{host}/a?CANARY")
    assert "CANARY" not in str(caught.value)


def test_http_on_a_port_for_https_is_no_reason_to_go_on(server: ShardServer, cache: ShardCache) -> None:
    with pytest.raises(RemoteError, match="does not speak https"):
        cache.size_of(server.url("a").replace("http:", "https:"))


def test_the_login_of_a_host_is_found_in_netrc(
    server: ShardServer, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password CANARY\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    cache.size_of(server.url("a"))
    assert server.requests[-1].headers["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("fault, seconds", [("cut", 0.0), ("cut", 0.5), ("reset", 0.0)])
def test_what_came_before_a_break_is_returned_first(server: ShardServer, fault: str, seconds: float) -> None:
    """Even if the reader is so late that the connection has ended by then."""
    server.faults["a"] += [fault]
    server.reset_after = 1.0
    body = Connections(5.0).open(server.url("a"))
    time.sleep(seconds)
    came = b"".join(body.read(40_000) for _ in range(4))
    assert came == FILE.content[: FILE.size // 2] and body.total == FILE.size
    with pytest.raises(Interrupted):
        body.read(FILE.size)
    body.close()


def test_what_trickles_in_after_a_stall_does_not_keep_a_slow_reader(server: ShardServer) -> None:
    server.always["a"] = "drip"
    body = Connections(1.0).open(server.url("a"))
    with pytest.raises(Interrupted, match=r"next to nothing came for 1 s"):
        for _ in range(50):
            body.read(FILE.size)
            time.sleep(0.05)  # while the next bytes come
    body.close()


def test_a_forked_child_has_connections_of_its_own(server: ShardServer, cache: ShardCache) -> None:
    """Parent and child read in turn; what the child does to its copies does not disturb the parent."""
    assert cache.size_of(server.url("a")) == FILE.size
    child = os.fork()
    if child == 0:
        try:
            right = cache.read_small(server.url("a"), max_bytes=FILE.size) == FILE.content
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert cache.read_small(server.url("a"), max_bytes=FILE.size) == FILE.content
    assert os.waitpid(child, 0)[1] == 0
    assert cache.size_of(server.url("a")) == FILE.size
    assert len(server.requests) == 4


def test_libraries_are_imported_at_the_first_remote_access() -> None:
    heavy = "{'fsspec', 'aiohttp', 's3fs', 'botocore'}"
    code = f"import sys, data_pipeline.loading.prefetch, data_pipeline.shards.index; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_that_has_read_ends_quietly(server: ShardServer) -> None:
    lines = (
        "from data_pipeline.remote.remote import CacheConfig, ShardCache",
        f"print(ShardCache(CacheConfig()).size_of({server.url('a')!r}))",
    )
    ended = subprocess.run([sys.executable, "-X", "dev", "-c", "; ".join(lines)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{FILE.size}\n", "")


def test_without_s3fs_there_is_one_line(cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(RemoteError, match=r"s3://bucket/a: S3 needs .*: pip install nextscale\[s3\]$"):
        cache.size_of("s3://bucket/a")


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


def test_s3_is_asked_for_by_signed_requests(login: pytest.MonkeyPatch, server: ShardServer, cache: ShardCache) -> None:
    """The one fast test of S3; those against a whole S3 server are among the faults."""
    server.files["bucket/a/b+ü.tar"] = server.files["bucket/a/b%2B%C3%BC.tar"] = FILE.content
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):  # the second wins
        login.setenv(name, server.url("").rstrip("/"))
        assert hasty_cache(cache.config.path).size_of("s3://bucket/a/b+ü.tar") == FILE.size
        assert "X-Amz-Signature=" in server.requests[-1].path
        login.setenv(name, "http://127.0.0.1:1")
    server.headers["x-amz-bucket-region"] = "eu-west-1"
    server.always["bucket/a"] = "301"
    login.setenv("AWS_ENDPOINT_URL_S3", server.url("").rstrip("/"))
    with pytest.raises(RemoteError, match="set AWS_REGION='eu-west-1'"):
        cache.size_of("s3://bucket/a")


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
    login: pytest.MonkeyPatch, cache: ShardCache, name: str, value: str | None, message: str
) -> None:
    login.delenv(name) if value is None else login.setenv(name, value)
    with pytest.raises(RemoteError, match=message) as caught:
        cache.size_of("s3://bucket/a/b+c.tar")
    assert "CANARY" not in str(caught.value) and "Signature" not in str(caught.value)


@pytest.mark.faults
def test_an_s3_server_behind_a_bad_network(login: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fifth of the connections breaks, one never answers; every copy is right."""
    with s3_server({"a/b+c.tar": FILE.content}) as port, faulty_relay(port, every=5, stalled={2}) as relay:
        login.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{relay.port}")
        for _ in range(20):
            cache = hasty_cache(tmp_path / "cache", stall_seconds=0.5)  # with connections of its own
            copy = cache.fetch("s3://bucket/a/b+c.tar", **FILE.expected)
            assert copy.read_bytes() == FILE.content
            copy.unlink()
        for missing in ("s3://bucket/none", "s3://none/a"):
            with pytest.raises(FileNotFoundError, match=f"{missing}: no such file"):
                cache.size_of(missing)
    assert relay.broken >= 4
