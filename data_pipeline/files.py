"""Two habits for files and folders that must not be wrong: appear complete or not at all, be known by their sha256."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be written that appears under `path` only when complete and on disk, or not at all."""
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"  # other machines have processes of the same number
    temporary = path.with_name(f".{path.name}.tmp-{unique}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:  # writing does not say to which file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def refuse_occupied(folder: Path) -> None:
    """Raise ValueError if there is something at `folder` that writing it would replace."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: is not empty; choose another folder, or remove this one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another folder")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled that appears as `folder` only when complete and on disk, or not at all.

    Raises ValueError if there is something at `folder` already.
    """
    refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()  # "." has no name
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    try:
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        os.rename(temporary, folder)  # takes the place of an empty folder, never of another
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """sha256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return open_file_sha256(file)


def open_file_sha256(file: BinaryIO) -> str:
    """sha256 of an open file from where it stands to its end."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_sha256(content: bytes) -> str:
    """sha256 of bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def _sync(path: Path) -> None:
    # For a folder: without this the new names in it may be lost in a power failure.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
