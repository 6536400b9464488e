"""The class of a sample comes from cls, or from a field of json; anything but a class number is refused."""

from __future__ import annotations

import json

import pytest

from data_pipeline.images.labels import label_of
from data_pipeline.shards.members import Sample


@pytest.mark.parametrize(
    "members, label",
    [({"cls": b"7"}, 7), ({"cls": b"12\n"}, 12), ({"json": b'{"label": 3}'}, 3), ({"cls": b"1", "json": b"{}"}, 1)],
)
def test_the_class_is_found(members: dict[str, bytes], label: int) -> None:
    assert label_of(Sample("a", members)) == label


def test_the_field_of_json_can_be_chosen() -> None:
    assert label_of(Sample("a", {"json": b'{"class_id": 5, "label": "cat"}'}), "class_id") == 5


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"png": b""}, "no label among the members"),
        ({"cls": b""}, "expected a class number"),
        ({"cls": b"-1"}, "expected a class number"),
        ({"cls": "\u0663".encode()}, "expected a class number"),
        ({"cls": b"9" * 5000}, "expected a class number"),
        ({"json": b"{"}, "not valid JSON"),
        ({"json": b"[3]"}, "expected a class number"),
        ({"json": b'{"label": true}'}, "expected a class number"),
        ({"json": b'{"label": 1.5}'}, "expected a class number"),
        ({"json": json.dumps({"label": 1, "text": "x" * 2**20}).encode()}, "at most"),
    ],
)
def test_anything_else_is_refused_with_a_reason(members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        label_of(Sample("a", members))
