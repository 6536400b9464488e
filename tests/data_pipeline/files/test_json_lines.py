"""JSON lines are appended whole or not at all, and a damaged one costs no other."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.json_lines import BEGINNING, append_lines, number_of, read_lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "events.jsonl"


def numbers(path: Path) -> list[int | None]:
    """The number in each line, None for damage."""
    return [line.value and line.value["n"] for line in read_lines(path)]


@contextmanager
def no_room_after(num_bytes: int) -> Iterator[None]:
    """Let the kernel cut every file of this process at a size, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_appended_is_read_back_in_order(path: Path) -> None:
    assert numbers(path) == []
    append_lines(path, [{"n": 1}, {"n": 2}])
    append_lines(path, [])
    append_lines(path, [{"n": 3}])
    assert numbers(path) == [1, 2, 3]
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n'


def test_numbers_that_json_does_not_have_are_written_as_null(path: Path) -> None:
    append_lines(path, [{"norm": float("inf"), "error": [0.5, float("nan")], "of": {"rank": -float("inf")}}])
    [line] = read_lines(path)
    assert line.value == {"norm": None, "error": [0.5, None], "of": {"rank": None}}


def test_lines_and_the_name_of_a_new_file_are_forced_to_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    for _ in range(2):
        append_lines(path, [{"n": 1}])
    assert synced == [str(path.parent), str(path), str(path)]


@pytest.mark.parametrize("cut", ['{"n": 2, "more', '{"n": 2}', "9" * 10_000])
def test_a_line_that_a_crash_has_cut_is_left_out_and_written_over(path: Path, cut: str) -> None:
    append_lines(path, [{"n": 1}])
    with path.open("a") as file:
        file.write(cut)
    assert numbers(path) == [1]
    append_lines(path, [{"n": 3}])
    assert numbers(path) == [1, 3]


def test_after_a_write_that_failed_half_way_the_file_is_what_it_was(path: Path) -> None:
    append_lines(path, [{"n": 1}])
    before = path.read_bytes()
    with no_room_after(len(before) + 13), pytest.raises(OSError) as caught:
        append_lines(path, [{"n": 2}, {"n": 3}])
    assert caught.value.errno == errno.EFBIG and path.read_bytes() == before


def test_after_an_fsync_that_failed_the_file_is_what_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_lines(path, [{"n": 1}])
    before = path.read_bytes()

    def fail(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        append_lines(path, [{"n": 2}])
    assert path.read_bytes() == before


DAMAGED = [
    *("7", "[1]", "", '{"n": ', "[" * 10**5, '{"n": NaN}', '{"n": 3, "n": 4}', '{"n": ' + "9" * 5000 + "}", "\udcff"),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_line_is_known_by_its_number_and_costs_no_other(path: Path, content: str) -> None:
    append_lines(path, [{"n": 1}])
    with path.open("ab") as file:
        file.write(content.encode(errors="surrogateescape") + b"\n")
    append_lines(path, [{"n": 2}])
    assert numbers(path) == [1, None, 2]
    [damaged] = [line for line in read_lines(path) if line.value is None]
    assert number_of(path, damaged) == 2


def test_a_line_too_long_to_be_one_is_damage_in_pieces(path: Path) -> None:
    append_lines(path, [{"n": 1}, {"n": 2, "pad": "x" * 3 * 2**20}, {"n": 3}])
    assert numbers(path) == [1, None, None, None, None, 3]
    assert b"".join(line.content for line in read_lines(path)) == path.read_bytes()


def test_a_reader_goes_on_where_it_was_and_starts_anew_when_the_file_was_replaced(path: Path) -> None:
    append_lines(path, [{"n": 1}, {"n": 2}])
    *_, last = read_lines(path, BEGINNING)
    append_lines(path, [{"n": 3}])
    assert [line.value for line in read_lines(path, last.place)] == [{"n": 3}]
    replacement: list[dict[str, Any]] = [{"n": number} for number in range(4, 9)]  # longer than the old file
    append_lines(path.with_name("new"), replacement)
    os.replace(path.with_name("new"), path)
    assert [line.value for line in read_lines(path, last.place)] == replacement


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert list(read_lines(tmp_path / "pipe")) == []
