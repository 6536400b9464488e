"""JSON files that others may have written, read without trust: regular files only, and JSON with one meaning.

Python's own reader accepts a key given twice, NaN, and numbers, nesting and values without end.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 2**20  # a manifest of 5,000 ranks; as Python's values that can be fifty times as much
MAX_VALUES = 1_000_000  # each takes up to 100 bytes of memory, however short it is in the file
MAX_DIGITS = 20
MAX_DEPTH = 64


def read_regular_file(path: Path, *, max_bytes: int, follow_links: bool = True) -> bytes:
    """Read the content of a file. A pipe is not waited for, and an endless file is not read.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: no regular file, or one of more bytes.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    what = path.stat(follow_symlinks=follow_links)
    if not stat.S_ISREG(what.st_mode):
        raise ValueError(f"is {_kind(what.st_mode)}, no regular file")
    with os.fdopen(os.open(path, flags), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"has {what.st_size} bytes, at most {max_bytes} are accepted")
    return content


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Read the plain values in a JSON file. Raises OSError and ValueError as the functions that it is made of."""
    return parse_json(read_regular_file(path, max_bytes=max_bytes))


def parse_json(content: bytes) -> Any:
    """Parse a JSON text in UTF-8 to plain values.

    Raises:
        ValueError: not JSON, a key given twice, a number that is none or has no end, too many values, or nested too
            deeply.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"holds more than {MAX_VALUES} values")
    try:
        value = _DECODER.decode(content.decode())
    except UnicodeDecodeError:
        raise ValueError("is not valid JSON: no UTF-8 text") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error})") from None
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError("is nested too deeply")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _is_deeper(item, levels - 1) for item in inside if isinstance(item, (dict, list)))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"gives {next(key for key in keys if keys.count(key) > 1)[:80]!r} twice")
    return mapping


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"holds a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is no number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_repeats, parse_int=_whole_number, parse_constant=_refuse_constant
)
