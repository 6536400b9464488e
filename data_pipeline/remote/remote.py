"""Shards behind http(s) and s3 URLs, as local files: fetched once per node, verified, kept as long as there is room."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.damage import DamagedData
from data_pipeline.files.urls import SCHEMES, check_location, is_url, without_query
from data_pipeline.remote.cache_folder import CacheFolder, Part
from data_pipeline.remote.downloads import LONGEST_PAUSE, Downloads, RemoteError, WrongSize

MAX_NEW_BYTES = 64 * 2**30  # of a shard that no index vouches for
REMOVED_TIMES = 10  # before a cache is called too small for those who share it
SIZES_AT_ONCE = 16
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

__all__ = ["SCHEMES", "CacheConfig", "RemoteError", "ShardCache", "check_location", "is_url", "without_query"]


@dataclass(frozen=True)
class CacheConfig:
    """Where fetched shards lie, how much room they take, and how patient the fetching is."""

    folder: str = ""  # empty: $XDG_CACHE_HOME/nextscale/shards, or ~/.cache in its place; on a disk of the node
    max_gib: float = 100.0
    stall_seconds: float = 30.0  # a server that is silent for as long is asked again
    retries: int = 8  # in a row, with longer and longer pauses
    ahead: int = 4  # shards that are fetched before they are needed

    def __post_init__(self) -> None:
        if not 0 < self.max_gib < 2**30:
            raise ValueError(f"data.cache.max_gib is {self.max_gib}; it must be more than 0")
        if not 0 < self.stall_seconds <= 3600:
            raise ValueError(f"data.cache.stall_seconds is {self.stall_seconds}; it must be more than 0, at most 3600")
        if not 0 <= self.retries <= 100:
            raise ValueError(f"data.cache.retries is {self.retries}; it must be 0 to 100")
        if not 0 <= self.ahead <= 10_000:
            raise ValueError(f"data.cache.ahead is {self.ahead}; it must be 0 to 10000 shards")
        if is_url(self.folder):
            raise ValueError(f"data.cache.folder is {without_query(self.folder)!r}; it must be a local folder")

    @property
    def path(self) -> Path:
        """The folder, as an absolute path."""
        if self.folder:
            return Path(self.folder).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser().absolute() / "nextscale" / "shards"


class ShardCache:
    """Local copies of remote shards. For many threads and processes at once, and may be sent between them."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._max_bytes = int(config.max_gib * 2**30)
        self._downloads = Downloads(stall_seconds=config.stall_seconds, retries=config.retries)

    def fetch(self, url: str, *, size: int, sha256: str) -> Path:
        """The local copy of a shard, after it was fetched and verified if it was not here.

        It may be removed once other shards need its room: open it at once, and what is open stays readable.

        Raises:
            FileNotFoundError: there is no such file.
            RemoteError: the server does not deliver.
            DamagedData: it delivers other bytes, twice.
            ValueError: the cache is too small, or is a folder that others may change.
        """
        folder = self._folder()
        while (path := folder.find(sha256, size)) is None:
            with folder.claim(sha256) as part:
                if not (folder.folder / sha256).exists():  # else another process has brought it meanwhile
                    return self._bring(folder, part, url, size, sha256)
        return path

    def open(self, url: str, *, size: int, sha256: str) -> int:
        """A descriptor of the local copy, which stays good when the copy is removed. Raises as `fetch` does."""
        for _ in range(REMOVED_TIMES):
            try:
                return os.open(self.fetch(url, size=size, sha256=sha256), os.O_RDONLY)
            except FileNotFoundError as error:
                if error.filename is None or Path(error.filename).name != sha256:
                    raise  # the server has none; the other is the copy, removed between two calls
        raise RemoteError(f"{without_query(url)}: removed from the cache whenever it came; raise data.cache.max_gib")

    def drop(self, sha256: str) -> None:
        """Forget the local copy of a file, which has turned out to be damaged."""
        (self._folder().folder / sha256).unlink(missing_ok=True)

    def fetch_unless_claimed(self, url: str, *, size: int, sha256: str) -> None:
        """As `fetch`, but does not wait for another process that is bringing it."""
        folder = self._folder()
        if not folder.is_claimed(sha256):
            self.fetch(url, size=size, sha256=sha256)

    def fetch_new(self, url: str) -> tuple[Path, int, str]:
        """The local copy of a shard that no index knows yet, its size and sha256. Raises as `fetch` does."""
        size = self.size_of(url)
        if size > MAX_NEW_BYTES:
            raise ValueError(f"{without_query(url)}: {size} bytes, a shard has at most {MAX_NEW_BYTES}")
        folder = self._folder()
        with folder.claim(hashlib.sha256(url.encode()).hexdigest()) as part:
            path = self._bring(folder, part, url, size, "")
        return path, size, path.name

    def size_of(self, url: str) -> int:
        """Bytes of a file, as the server says. Raises FileNotFoundError or RemoteError."""
        return self._downloads.size_of(url)

    def sizes_of(self, urls: Sequence[str]) -> list[int]:
        """Bytes of many files, asked for several at once. Raises FileNotFoundError or RemoteError."""
        with ThreadPoolExecutor(SIZES_AT_ONCE) as pool:
            return list(pool.map(self.size_of, urls))

    def read_small(self, url: str, *, max_bytes: int) -> bytes:
        """A file that is never cached. Raises FileNotFoundError, RemoteError, and ValueError if it is larger."""
        return self._downloads.read_small(url, max_bytes=max_bytes)

    def check_room(self, bytes_at_once: int, *, window: int) -> None:
        """Raise ValueError if the shards that a window of so many samples needs do not fit together."""
        if bytes_at_once > self._max_bytes:
            raise ValueError(
                f"data.cache.max_gib is {self.config.max_gib:g}, but the shards of data.window={window} samples and"
                f" the {self.config.ahead} of data.cache.ahead take up to {bytes_at_once / 2**30:.3g} GiB;"
                " raise the first or lower the second"
            )

    def _folder(self) -> CacheFolder:
        patience = (self.config.retries + 1) * (self.config.stall_seconds + LONGEST_PAUSE)
        folder = CacheFolder(self.config.path, max_bytes=self._max_bytes, patience=patience)
        folder.create()
        return folder

    def _bring(self, folder: CacheFolder, part: Part, url: str, size: int, sha256: str) -> Path:
        folder.make_room(part, size)
        try:
            return part.keep(self._whole(part, url, size, sha256))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            what = f"no room for {size} bytes of {without_query(url)}; make some, or set data.cache.folder"
            raise OSError(error.errno, what, str(folder.folder)) from None

    def _whole(self, part: Part, url: str, size: int, sha256: str) -> str:
        """Write all of it; its sha256, which must be the one given if one is."""
        fault = ""
        for _ in range(2):
            try:
                found = self._downloads.copy(url, part.descriptor, size=size)
            except WrongSize as error:
                fault = f"{error}, expected {size}"
                continue
            if found == (sha256 or found):
                return found
            fault = f"sha256 is {found}, expected {sha256}"
        raise DamagedData(f"{without_query(url)}: {fault}, twice; copy or pack it again")
