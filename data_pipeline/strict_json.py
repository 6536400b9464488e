"""JSON that others may have written: read whole and unambiguous, or refused with a reason."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_VALUES = 1_000_000  # each takes up to 100 bytes, however short it is in the file


def parse_json(content: bytes) -> Any:
    """Plain values from UTF-8 JSON.

    Raises:
        ValueError: not JSON, a key given twice, a number that is none, too many values, or nested too deeply.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    try:
        return json.loads(content.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return mapping


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
