"""Shards behind http(s) and s3 URLs as local files: fetched once per node, verified, and kept while there is room.

A folder holds files named by their sha256, of bounded size, and many processes share it. fsspec's own caches lack all
of this: a bound on their size, a checksum, and processes that wait for each other's downloads. A copy is written under
a temporary name and appears under its own only whole. Whoever fetches a file holds the lock `<sha256>.lock`, which ends
with the process; the others wait. Where locks do not work, two may fetch the same file, and both copies are right.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.files.atomic import atomic_file, file_sha256
from data_pipeline.files.damage import DamagedData
from data_pipeline.files.locks import release_lock, take_lock
from data_pipeline.files.urls import is_url, without_query
from data_pipeline.remote.open import LONGEST_PAUSE, RemoteError, RemoteFiles, WrongSize

MAX_NEW_BYTES = 64 * 2**30  # of a shard that no index vouches for
REMOVED_TIMES = 10  # before a cache is called too small for those who share it
SIZES_AT_ONCE = 16
LOOK_SECONDS = 0.05  # between two looks whether another process is ready
COPY = re.compile(r"[0-9a-f]{64}")
PART = re.compile(r"\.[0-9a-f]{64}\.tmp-.*")  # as atomic_file names what is not whole yet


@dataclass(frozen=True)
class CacheConfig:
    """Where fetched shards lie, how much room they take, and how patient the fetching is."""

    folder: str = ""  # empty: $XDG_CACHE_HOME/nextscale/shards, or ~/.cache in its place; on a disk of the node
    max_gib: float = 100.0
    stall_seconds: float = 30.0  # a server that is silent for as long is asked again
    retries: int = 8  # of one request, with longer and longer pauses
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
        """The folder as an absolute path."""
        if self.folder:
            return Path(self.folder).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser().absolute() / "nextscale" / "shards"

    @property
    def max_bytes(self) -> int:
        """The most bytes that all copies may take together."""
        return int(self.max_gib * 2**30)

    @property
    def patience(self) -> float:
        """The seconds without any sign of life after which another process is given up."""
        return (self.retries + 1) * (self.stall_seconds + LONGEST_PAUSE)


class ShardCache:
    """Local copies of remote shards, for many threads and processes at once. It may be sent between processes."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._files = RemoteFiles(stall_seconds=config.stall_seconds, retries=config.retries)

    def open(self, url: str, *, size: int, sha256: str) -> int:
        """Open the local copy of a shard, fetched and verified if need be, and return its descriptor.

        The descriptor stays good when the copy is removed to make room.

        Raises:
            FileNotFoundError: there is no such file.
            RemoteError: the server does not deliver.
            DamagedData: it delivers other bytes, twice.
            ValueError: the cache is too small, or is a folder that others may change.
        """
        self._prepare_folder()
        for _ in range(REMOVED_TIMES):
            if (descriptor := self._open_copy(sha256, size)) is not None:
                return descriptor
            with self._claimed(sha256):
                self._fetch_unless_here(url, size, sha256)
        raise RemoteError(f"{without_query(url)}: removed from the cache whenever it came; raise data.cache.max_gib")

    def fetch_unless_claimed(self, url: str, *, size: int, sha256: str) -> None:
        """Fetch a shard for later, unless it is here or another process is fetching it. Raises as `open` does."""
        self._prepare_folder()
        if (lock := take_lock(self._lock_path(sha256))) is not None:
            try:
                self._fetch_unless_here(url, size, sha256)
            finally:
                release_lock(lock)

    def fetch_new(self, url: str) -> Path:
        """Fetch a shard that no index knows yet, and return the path of its copy. Raises as `open` does."""
        size = self.size_of(url)
        if size > MAX_NEW_BYTES:
            raise ValueError(f"{without_query(url)}: {size} bytes, a shard has at most {MAX_NEW_BYTES}")
        self._prepare_folder()
        name = hashlib.sha256(url.encode()).hexdigest()
        with self._claimed(name):
            path = self._fetch(url, size, name, sha256="")
            return path.rename(path.with_name(file_sha256(path)))

    def drop(self, sha256: str) -> None:
        """Forget the local copy of a file, which has turned out to be damaged."""
        (self.config.path / sha256).unlink(missing_ok=True)

    def size_of(self, url: str) -> int:
        """Return the bytes of a file, as the server says. Raises FileNotFoundError or RemoteError."""
        return self._files.size_of(url)

    def sizes_of(self, urls: Sequence[str]) -> list[int]:
        """Return the bytes of many files, asked for several at once. Raises FileNotFoundError or RemoteError."""
        with ThreadPoolExecutor(SIZES_AT_ONCE) as pool:
            return list(pool.map(self.size_of, urls))

    def read_small(self, url: str, *, max_bytes: int) -> bytes:
        """Read a file without caching it. Raises FileNotFoundError, RemoteError, and ValueError if it is larger."""
        return self._files.read_small(url, max_bytes=max_bytes)

    def check_room(self, bytes_at_once: int, *, window: int) -> None:
        """Raise ValueError if the shards that a window of so many samples needs do not fit together."""
        if bytes_at_once > self.config.max_bytes:
            raise ValueError(
                f"{self._setting}, but the shards of data.window={window} samples and the {self.config.ahead} of"
                f" data.cache.ahead take up to {bytes_at_once / 2**30:.3g} GiB; raise the first or lower the second"
            )

    @property
    def _setting(self) -> str:
        return f"data.cache.max_gib is {self.config.max_gib:g}"

    def _lock_path(self, name: str) -> Path:
        return self.config.path / f"{name}.lock"

    def _prepare_folder(self) -> None:
        """Make the folder, for this user alone. Raises ValueError for one that somebody else could change."""
        folder = self.config.path
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"data.cache.folder is {folder}, which is a file; choose a folder") from None
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"data.cache.folder is {folder}, a symbolic link; give the folder that it leads to")
        if found.st_uid != os.geteuid():
            raise ValueError(f"data.cache.folder is {folder}, which belongs to another user; choose your own")
        if found.st_mode & 0o022:
            raise ValueError(f"data.cache.folder is {folder}, which others may write to; run chmod go-w on it")

    def _open_copy(self, sha256: str, size: int) -> int | None:
        """Open a whole copy, from now on the one used last. None, and whatever is in its place removed: not here."""
        path = self.config.path / sha256
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink(missing_ok=True)
            return None
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_size == size and found.st_uid == os.geteuid():
            _mark_used(descriptor)
            return descriptor
        os.close(descriptor)
        path.unlink(missing_ok=True)
        return None

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        """Hold the right to fetch a file, waiting for another process that has it as long as that writes anything."""
        seen, since = 0, time.monotonic()
        while (lock := take_lock(self._lock_path(name))) is None:
            parts = self.config.path.glob(f".{name}.tmp-*")
            if (written := max((_changed(path) for path in parts), default=0)) != seen:
                seen, since = written, time.monotonic()
            if time.monotonic() - since > self.config.patience:
                what = f"another process holds {name} and does nothing; end it"
                raise TimeoutError(errno.ETIMEDOUT, what, str(self.config.path))
            time.sleep(LOOK_SECONDS)
        try:
            yield
        finally:
            release_lock(lock)

    def _fetch_unless_here(self, url: str, size: int, sha256: str) -> None:
        if (descriptor := self._open_copy(sha256, size)) is None:
            self._fetch(url, size, sha256, sha256=sha256)
        else:
            os.close(descriptor)

    def _fetch(self, url: str, size: int, name: str, *, sha256: str) -> Path:
        """Write a copy that appears under its name when it is whole, and has this sha256 if one is given."""
        with atomic_file(self.config.path / name) as file:
            self._make_room(file, size)
            fault = ""
            for _ in range(2):
                try:
                    self._files.copy(url, file, size=size)
                except WrongSize as error:
                    fault = f"{error}, expected {size}"
                    continue
                file.flush()
                found = file_sha256(Path(file.name)) if sha256 else ""
                if found == sha256:
                    break
                fault = f"sha256 is {found}, expected {sha256}"
            else:
                raise DamagedData(f"{without_query(url)}: {fault}, twice; copy or pack it again")
            _mark_used(file.fileno())
        return self.config.path / name

    def _make_room(self, file: BinaryIO, size: int) -> None:
        """Give a new file its size, so that it is counted, after removing the copies not used for the longest time.

        Waits for other downloads if nothing else is left. Raises ValueError if that does not help.
        """
        if size > self.config.max_bytes:
            raise ValueError(f"{self._setting}, a shard of {size} bytes does not fit; raise it")
        give_up = time.monotonic() + self.config.patience
        while True:
            if (lock := take_lock(self.config.path / ".lock")) is not None:
                try:
                    if self._remove_old(Path(file.name), size):
                        file.truncate(size)
                        return
                finally:
                    release_lock(lock)
            if time.monotonic() > give_up:
                raise ValueError(f"{self._setting}, too little for all shards fetched at once; raise it")
            time.sleep(LOOK_SECONDS)

    def _remove_old(self, own: Path, size: int) -> bool:
        """Remove what dead processes left, and copies until a part has room for its size. False: it has not."""
        copies: list[tuple[int, int, Path]] = []
        total, has_locks = size, not self._is_free(".lock")  # which is held now
        for path in self.config.path.iterdir():
            with suppress(FileNotFoundError):
                found = os.lstat(path)
                if COPY.fullmatch(path.name):
                    copies.append((found.st_mtime_ns, found.st_size, path))
                elif not PART.fullmatch(path.name) or path == own:
                    continue
                elif self._is_dead(path, own) if has_locks else time.time() - found.st_mtime > self.config.patience:
                    path.unlink()
                    continue
                total += found.st_size
        for _, bytes_, path in sorted(copies):
            if total <= self.config.max_bytes:
                break
            path.unlink(missing_ok=True)  # those who read it hold it open
            total -= bytes_
        return total <= self.config.max_bytes

    def _is_dead(self, part: Path, own: Path) -> bool:
        """Tell whether nobody writes a part any more: its lock is free, or is the one held here for another part."""
        name = part.name[1:65]
        return own.name.startswith(f".{name}.") or self._is_free(f"{name}.lock")

    def _is_free(self, lock_name: str) -> bool:
        if (lock := take_lock(self.config.path / lock_name)) is None:
            return False
        release_lock(lock)
        return True


def _changed(path: Path) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _mark_used(descriptor: int) -> None:
    now = time.time_ns()  # finer than the kernel's own stamps
    os.utime(descriptor, ns=(now, now))
