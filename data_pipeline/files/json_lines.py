"""Files of JSON lines: one JSON object a line, appended for good and read by others while they grow.

Written by hand because Python's files promise neither that a failed write leaves the file as it was, nor that a line
which a crash has cut does not swallow the next one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files.atomic import fsync
from data_pipeline.files.strict_json import parse_json

MAX_LINE_BYTES = 2**20  # a longer line is read in pieces, each of which is damaged


@dataclass(frozen=True)
class Place:
    """The byte up to which a reader has read, and the inode of the file, since a file may be replaced by another."""

    file: int = 0
    offset: int = 0


BEGINNING = Place()


@dataclass(frozen=True)
class Line:
    """A line as it stands in the file with its newline, the object that it holds, and the place where it ends."""

    content: bytes
    value: dict[str, Any] | None  # None: the line is damaged
    place: Place


def append_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """Append objects, one a line, and force them to disk; numbers that JSON does not have are written as null.

    What a crash has left of a last line is cut off first.

    Raises:
        OSError: the disk does not take all of it. The file then holds the lines that it held before.
    """
    lines = b"".join(json.dumps(_with_finite_numbers(value), allow_nan=False).encode() + b"\n" for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a+b", buffering=0) as file:
        if is_new:
            fsync(path.parent)
        end = _end_of_last_line(file)
        file.truncate(end)
        try:
            written = 0
            while written < len(lines):
                written += file.write(lines[written:])
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def read_lines(path: Path, place: Place = BEGINNING) -> Iterator[Line]:
    """Yield the whole lines after `place`, or all lines if the file has been replaced since; none if there is no file.

    A last line without its newline is being written, or was cut by a crash: it is left out.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        is_same = place.file == status.st_ino and place.offset <= status.st_size
        offset = file.seek(place.offset if is_same else 0)
        while content := file.readline(MAX_LINE_BYTES):
            if not content.endswith(b"\n") and len(content) < MAX_LINE_BYTES:
                return
            offset += len(content)
            yield Line(content, _parsed(content), Place(status.st_ino, offset))


def number_of(path: Path, line: Line) -> int:
    """Count from 1 to the number of a line in its file."""
    with path.open("rb") as file:
        return file.read(line.place.offset - len(line.content)).count(b"\n") + 1


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _with_finite_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_finite_numbers(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_finite_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_of_last_line(file: BinaryIO) -> int:
    """Find the offset after the last newline; 0 where there is none."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
