"""JSON from elsewhere is unambiguous, or refused with a reason; it never brings the program down."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.strict_json import parse_json

NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_what_was_written_is_read(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_values_or_a_value_error(content: bytes) -> None:
    try:
        parse_json(content)
    except ValueError:
        pass


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"-Infinity", "-Infinity is not a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "digits"),
        (b"\xff", "decode"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_ambiguous_or_endless_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(content)
