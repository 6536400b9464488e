"""The report of a packing: counts add up however the images are divided into shards."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from data_pipeline.making.pack_report import MAX_REASONS, SplitCount, printable, report_lines, spread

IMAGES = some.lists(some.tuples(some.integers(0, 2), some.integers(1, 50), some.integers(1, 50), some.integers(0, 99)))


def count(images: list[tuple[int, int, int, int]]) -> SplitCount:
    counted = SplitCount()
    for image in images:
        counted.add_image(*image)
    return counted


@given(IMAGES, some.integers(0, 20))
def test_shards_counted_apart_add_up_to_the_whole(images: list, cut: int) -> None:
    added = SplitCount()
    for part in (images[:cut], images[cut:]):
        added.add_json(json.loads(json.dumps(vars(count(part)))))
    assert added == count(images)


@given(some.lists(some.integers(0, 1000), min_size=1))
def test_the_spread_is_that_of_the_sorted_values(values: list[int]) -> None:
    ranked = sorted(values)
    expected = {"min": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "max": ranked[-1]}
    assert spread(Counter(map(str, values))) == expected


def test_classes_without_images_are_in_the_table() -> None:
    summary = count([(0, 4, 6, 100), (0, 8, 2, 50), (2, 5, 5, 7)]).summary(["a", "b", "c"])
    assert summary["samples_per_class"] == {"min": 0, "median": 1, "max": 2, "table": {"a": 2, "b": 0, "c": 1}}
    assert summary["width"] == {"min": 4, "median": 5, "max": 8} and summary["height"]["median"] == 5
    assert (summary["images"], summary["image_bytes"]) == (3, 157)


def test_reasons_are_counted_and_their_number_is_bounded() -> None:
    counted = SplitCount()
    for number in range(2 * MAX_REASONS):
        counted.add_skipped(f"reason {number}")
    counted.add_skipped("reason 0")
    assert counted.skipped == sum(counted.reasons.values()) == 2 * MAX_REASONS + 1
    assert len(counted.reasons) == MAX_REASONS + 1 and counted.reasons["reason 0"] == 2
    for number in range(3):
        counted.add_json({"skipped": 1, "reasons": {f"another {number}": 1}})
    assert counted.skipped == sum(counted.reasons.values()) and len(counted.reasons) == MAX_REASONS + 1


def test_the_lines_say_what_was_left_out_and_why() -> None:
    counted = count([(0, 4, 6, 100)])
    for reason in ("not an image", "too large", "not an image"):
        counted.add_skipped(reason)
    found = {"listed": 4, "shards": 1, "bytes": 2_500_000, "first_skipped": ["a/new\nline.jpg", "not an image"]}
    report = {
        "splits": {"train": found | counted.summary(["a"])},
        "unused": ["readme"],
        "num_unused": 1,
        "num_hidden": 2,
    }
    said = "\n".join(report_lines(report))
    assert "1 images of 4 files in 1 shards, 2.5 MB" in said and "4/4/4 x 6/6/6 pixels" in said
    assert "2 skipped: not an image" in said and "1 skipped: too large" in said
    assert r"'a/new\nline.jpg'" in said and "readme" in said and "2 hidden" in said


@pytest.mark.parametrize(
    "name, shown",
    [("a b/ü.jpg", "a b/ü.jpg"), ("a\x1b[31m", r"'a\x1b[31m'"), ("\udcff", r"'\udcff'"), ("a\nb", r"'a\nb'")],
)
def test_what_a_terminal_cannot_show_is_written_with_escapes(name: str, shown: str) -> None:
    assert printable(name) == shown
    shown.encode()
