"""Sealed files: what was written comes back, and nothing else does."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from data_pipeline.files.atomic import read_sealed, seal_of, write_sealed

CONTENT = {"shard": {"name": "shard-000000.tar", "samples": 3}, "skipped": [["é\n", 0.5, None]]}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write_sealed(tmp_path / "entry.json", CONTENT)
    assert read_sealed(tmp_path / "entry.json") == CONTENT


def test_the_seal_does_not_depend_on_the_order_of_keys() -> None:
    assert seal_of(dict(reversed(CONTENT.items()))) == seal_of(CONTENT) != seal_of({**CONTENT, "more": 1})


def test_every_changed_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    write_sealed(path, CONTENT)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole) - 1)]  # the last is the end of the line
    damaged += [whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in (1, 0x80)]
    for content in damaged:
        path.write_bytes(content)
        with suppress(ValueError):
            assert read_sealed(path) == CONTENT  # as a changed blank between two words would be


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"\xff", b'{"sha256": 3}', b"[" * 100_000])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "entry.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_sealed(tmp_path / "entry.json")
