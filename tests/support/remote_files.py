"""Random files for tests of remote storage, caches without much patience, and an S3 server."""

from __future__ import annotations

import hashlib
import os
import random
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.remote.cache import CacheConfig, ShardCache


@dataclass(frozen=True)
class RemoteFile:
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def expected(self) -> dict[str, int | str]:
        """What an index says about it."""
        return {"size": self.size, "sha256": self.sha256}


def remote_file(size: int = 300_000, seed: int = 0) -> RemoteFile:
    return RemoteFile(random.Random(seed).randbytes(size))


def hasty_cache(folder: Path, *, stall_seconds: float = 0.3, retries: int = 4, **settings: float) -> ShardCache:
    config = CacheConfig(folder=str(folder), stall_seconds=stall_seconds, retries=retries, **settings)
    return ShardCache(config)


def fetched(cache: ShardCache, url: str, file: RemoteFile) -> bytes:
    """The content of a file as a cache hands it out."""
    with os.fdopen(cache.open(url, **file.expected), "rb") as copy:
        return copy.read()


FILE = remote_file()


@contextmanager
def s3_server(files: dict[str, bytes]) -> Iterator[int]:
    """The port of an S3 server with these objects in s3://bucket."""
    from moto.server import ThreadedMotoServer  # which takes seconds

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()

    def send(method: str, path: str, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", content, headers, method=method)
        assert urllib.request.urlopen(request).status == 200

    send("POST", "moto-api/reset", b"")  # what an earlier server has is still there
    send("PUT", "bucket", b"")
    for name, content in files.items():
        send("PUT", f"bucket/{name}", content)
    try:
        yield port
    finally:
        moto.stop()
