"""JSON with one meaning, from regular files only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.files.strict_json import MAX_DEPTH, parse_json, read_json, read_regular_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e300, 1e300) | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(), inside, max_size=4),
)


@given(VALUES)
def test_what_json_writes_is_read_as_it_was(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"{} {}", "is not valid JSON"),
        (b"\xff", "no UTF-8 text"),
        ("{}".encode("utf-16"), "no UTF-8 text"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "gives 'c' twice"),
        (b"[NaN]", "holds NaN, which is no number"),
        (b"[-Infinity]", "holds -Infinity"),
        (b"[" + b"9" * 21 + b"]", "a number of 21 digits"),
        (b"9" * 10**6, "a number of 1000000 digits"),
        (b"[" * 10**6, "nested too deeply"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested too deeply"),
    ],
)
def test_json_of_another_kind_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(content)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@given(st.binary(max_size=60))
def test_bytes_raise_nothing_but_value_error(content: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_json(content)


@pytest.mark.parametrize(
    "make, reason",
    [
        (Path.mkdir, "is a folder, no regular file"),
        (os.mkfifo, "is a pipe, no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, no regular file"),
        (lambda path: path.write_bytes(bytes(101)), "has 101 bytes, at most 100 are accepted"),
    ],
)
def test_only_regular_files_of_the_expected_size_are_read(
    tmp_path: Path, make: Callable[[Path], Any], reason: str
) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match=reason):
        read_regular_file(tmp_path / "a", max_bytes=100)


def test_links_are_followed_unless_they_must_not_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[1]")
    (tmp_path / "b").symlink_to("a")
    assert read_json(tmp_path / "b") == [1]
    with pytest.raises(ValueError, match="is a link, no regular file"):
        read_regular_file(tmp_path / "b", max_bytes=100, follow_links=False)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "c")
