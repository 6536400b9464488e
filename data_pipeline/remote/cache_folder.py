"""A folder of files named by their sha256, of bounded size, that all processes of a node share.

A file is written under a temporary name, `<sha256>.part`, on which its writer holds a lock that ends with the process:
whoever else wants the same file waits for it, and takes over if the writer dies. A part has its final size from the
start, so that what lies in the folder and what is still to come are counted alike. Not for network file systems: their
locks may not work, and each node is better served by a disk of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = re.compile(r"[0-9a-f]{64}")
PART = re.compile(r"[0-9a-f]{64}\.part")
LOOK_SECONDS = 0.05  # between two looks whether another process is ready


class CacheFolder:
    """Files by sha256. patience: seconds without any sign of life after which another process is given up."""

    def __init__(self, folder: Path, *, max_bytes: int, patience: float) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.patience = patience

    def find(self, sha256: str, size: int) -> Path | None:
        """The file with this content, from now on the one that was used last; none if it is not here, whole."""
        path = self.folder / sha256
        try:
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode) and found.st_size == size and found.st_uid == os.geteuid():
                _mark_used(path)
                return path
            path.unlink()
        except FileNotFoundError:
            pass
        return None

    def create(self) -> None:
        """Make the folder, for this user alone. Raises ValueError for one that somebody else could change."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(f"data.cache.folder is {self.folder}, which is a file; choose a folder") from None
        found = os.lstat(self.folder)
        if not stat.S_ISDIR(found.st_mode):
            raise ValueError(f"data.cache.folder is {self.folder}, a symbolic link; give the folder that it leads to")
        if found.st_uid != os.geteuid():
            raise ValueError(f"data.cache.folder is {self.folder}, which belongs to another user; choose your own")
        if found.st_mode & 0o022:
            raise ValueError(f"data.cache.folder is {self.folder}, which others may write to; run chmod go-w on it")

    @contextmanager
    def claim(self, name: str) -> Iterator[Part]:
        """The right to write one file, waited for if another process has it. What is not kept is removed."""
        part = self._locked_part(name)
        try:
            yield part
        finally:
            part.release()

    def is_claimed(self, name: str) -> bool:
        """Whether somebody is writing this file just now."""
        try:
            descriptor = os.open(self.folder / f"{name}.part", os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # there is none, or no file
            return False
        try:
            return not _try_lock(descriptor)
        finally:
            _unlock(descriptor)

    def make_room(self, part: Part, size: int) -> None:
        """Give a part its size, removing the files that were not used for the longest time.

        Waits for other downloads if nothing else is left. Raises ValueError if that does not help.
        """
        if size > self.max_bytes:
            raise ValueError(f"{self._setting()}, a shard of {size} bytes does not fit; raise it")
        give_up = time.monotonic() + self.patience
        while not self._reserve(part, size):
            if time.monotonic() > give_up:
                raise ValueError(f"{self._setting()}, too little for all shards fetched at once; raise it")
            time.sleep(LOOK_SECONDS)

    def _setting(self) -> str:
        return f"data.cache.max_gib is {self.max_bytes / 2**30:g}"

    def _reserve(self, part: Part, size: int) -> bool:
        with self._everything_locked():
            files, parts = self._contents(part)
            total = size + sum(parts) + sum(bytes_ for _, bytes_, _ in files)
            for _, bytes_, path in sorted(files):
                if total <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)  # those who read it hold it open
                total -= bytes_
            if total > self.max_bytes:
                return False
            os.ftruncate(part.descriptor, size)
            return True

    def _contents(self, own: Part) -> tuple[list[tuple[int, int, Path]], list[int]]:
        """(last use, bytes, path) of whole files, and bytes of the parts of other writers; dead ones are removed."""
        files: list[tuple[int, int, Path]] = []
        parts: list[int] = []
        for entry in os.scandir(self.folder):
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            path = Path(entry.path)
            if NAME.fullmatch(entry.name):
                files.append((found.st_mtime_ns, found.st_size, path))
            elif PART.fullmatch(entry.name) and path != own.path:
                if self.is_claimed(entry.name.removesuffix(".part")):
                    parts.append(found.st_size)
                else:
                    self._remove_dead(path)
        return files, parts

    def _remove_dead(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            path.unlink(missing_ok=True)  # what is no file was not made here
            return
        try:
            if _try_lock(descriptor) and _is_at(descriptor, path):
                path.unlink()
        finally:
            _unlock(descriptor)

    @contextmanager
    def _everything_locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._wait_for(descriptor, ".lock")
            yield
        finally:
            _unlock(descriptor)

    def _locked_part(self, name: str) -> Part:
        path = self.folder / f"{name}.part"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._wait_for(descriptor, path.name)
                if _is_at(descriptor, path):
                    os.ftruncate(descriptor, 0)  # of one that died
                    return Part(path, descriptor)
            except BaseException:
                _unlock(descriptor)
                raise
            _unlock(descriptor)  # it has become the whole file, or was removed

    def _wait_for(self, descriptor: int, name: str) -> None:
        """Lock it. Raises TimeoutError if the owner shows no sign of life; a write to the file is one."""
        seen, since = -1, time.monotonic()
        while not _try_lock(descriptor):
            written = os.fstat(descriptor).st_mtime_ns
            if written != seen:
                seen, since = written, time.monotonic()
            if time.monotonic() - since > self.patience:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"another process holds {name} and does nothing; end it", str(self.folder)
                )
            time.sleep(LOOK_SECONDS)


class Part:
    """A file that is being written, and locked."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._is_kept = False

    def keep(self, sha256: str) -> Path:
        """Let the file appear under its final name, whole and on disk."""
        _mark_used(self.descriptor)
        os.fsync(self.descriptor)
        final = self.path.with_name(sha256)
        os.replace(self.path, final)
        self._is_kept = True
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return final

    def release(self) -> None:
        """Let others have it. What was not kept is gone."""
        if not self._is_kept:
            self.path.unlink(missing_ok=True)
        _unlock(self.descriptor)


def _mark_used(file: Path | int) -> None:
    now = time.time_ns()  # finer than the kernel's own stamps
    os.utime(file, ns=(now, now))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    # Not by closing alone: a process forked meanwhile has the file open too.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one under this name."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
