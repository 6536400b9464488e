"""Tables line up: text to the left, numbers to the right."""

from __future__ import annotations

import pytest

from launchers.setup.tables import markdown_table, table

COLUMNS, ROWS = ["name", "speed"], [["ours", "12.5"], ["public code", "9"]]


def test_text_is_aligned_to_the_left_and_numbers_to_the_right() -> None:
    assert table(COLUMNS, ROWS) == "name         speed\nours          12.5\npublic code      9"


def test_a_table_without_rows_is_its_header() -> None:
    assert table(COLUMNS, [], left=2) == "name  speed"


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError):
        table(COLUMNS, [["ours"]])


def test_markdown_names_the_alignment_of_each_column() -> None:
    assert markdown_table(COLUMNS, ROWS[:1]) == "| name | speed |\n| --- | ---: |\n| ours | 12.5 |"
