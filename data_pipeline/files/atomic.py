"""Files and folders that appear complete or not at all, and their sha256.

Python's os.replace promises neither that the content is on disk before the name, nor that the name is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files.claim import claimed
from data_pipeline.files.strict_json import parse_json

SEAL = "sha256"  # the key under which a sealed file states its own hash
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
        fsync(path.parent)
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
    """Make a folder to be filled that appears as `folder` only when complete and on disk, or not at all.

    Raises:
        ValueError: there is something at `folder` already.
        Claimed: another process is making it.
    """
    refuse_occupied(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.absolute()  # "." has no name
    temporary = folder.with_name(f".{folder.name}.tmp")
    with claimed(folder.with_name(f".{folder.name}.owner"), folder):
        shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
        try:
            temporary.mkdir()
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                fsync(path)
            os.rename(temporary, folder)  # takes the place of an empty folder, never of another
            fsync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return open_file_sha256(file)


def open_file_sha256(file: BufferedReader) -> str:
    """Compute the sha256 of an open file from where it stands to its end."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_sha256(content: bytes) -> str:
    """Compute the sha256 of bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk; a power failure may lose names that were not forced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal_of(content: Any) -> str:
    """Compute the sha256 of plain JSON, whatever the order of its keys."""
    return bytes_sha256(json.dumps(content, sort_keys=True).encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping of plain JSON, all keys text, with its own sha256, in one step."""
    with atomic_file(path) as file:
        file.write(json.dumps({**content, SEAL: seal_of(content)}).encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote. Raises FileNotFoundError, and ValueError with a reason for anything else."""
    content = parse_json(path.read_bytes())
    if not isinstance(content, dict) or content.pop(SEAL, None) != seal_of(content):
        raise ValueError("its sha256 is not the one it states")
    return content
