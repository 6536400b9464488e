"""Claims: however many workers fill a folder, and however they die, it ends with the same bytes, each made once."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import claimed_shards
import pytest
from claimed_shards import NAMES, PLAN, make_claims, make_shard
from workers import content, die_at, ended_well, fork, kill, wait_for

from data_pipeline.files.atomic import read_sealed, write_sealed
from data_pipeline.files.damage import DamagedData
from data_pipeline.making import claims
from data_pipeline.making.claims import Claims, Entry, forget_finished_work, shard_of
from data_pipeline.shards.index import Index, is_complete


def merge(work: Claims) -> None:
    shards = tuple(shard for name in claimed_shards.NAMES if (shard := shard_of(work.entry(name))) is not None)
    Index("images", shards, {"classes": ["a"]}).write(work.folder)


def fill(folder: Path, *, seconds: float = 0.0, make: Callable[..., Entry] = make_shard) -> None:
    """What each worker does."""
    work = make_claims(folder)
    work.open()
    work.finish(partial(make, folder, seconds=seconds), partial(merge, work))


def fill_and_die(call: int, folder: Path) -> None:
    die_at(call)
    fill(folder)


def made(folder: Path) -> list[str]:
    path = folder.with_suffix(".made")
    return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("claims") / "out"
    fill(folder)
    assert made(folder) == list(NAMES)
    files = content(folder)
    assert set(files) == {f"{name}.{suffix}" for name in NAMES for suffix in ("tar", "members")} | {"index.json"}
    return files


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.02)


def test_workers_killed_at_any_time_leave_no_trace(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out, instants = tmp_path / "out", random.Random(0)
    for _ in range(8):
        child = fork(partial(fill, out, seconds=0.03))
        time.sleep(instants.uniform(0.0, 0.06))
        kill(child)
    assert not is_complete(out)
    fill(out)
    assert content(out) == undisturbed
    assert len(NAMES) < len(made(out)) < 8 * len(NAMES)  # something was lost, and something was kept


def test_a_kill_between_any_two_steps_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claimed_shards, "NAMES", NAMES[:1])
    fill(tmp_path / "whole")
    for call in itertools.count():
        out = tmp_path / f"out{call}"
        survived = ended_well(fork(partial(fill_and_die, call, out)))
        fill(out)
        assert content(out) == content(tmp_path / "whole")
        if survived:
            break
    assert call > 20


def test_two_workers_share_the_shards(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    children = [fork(partial(fill, out, seconds=0.02)) for _ in range(3)]
    assert [ended_well(child) for child in children] == 3 * [True]
    assert content(out) == undisturbed
    assert sorted(made(out)) == list(NAMES)


def test_a_worker_that_waits_takes_over_what_a_killed_one_drops(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    doomed = fork(partial(fill, out, seconds=60))
    wait_for(lambda: made(out) == [NAMES[0]])
    waiting = fork(partial(fill, out))
    wait_for(lambda: len(list((out / ".work").glob("shard-*.json"))) == len(NAMES) - 1)
    kill(doomed)
    assert ended_well(waiting)
    assert content(out) == undisturbed and made(out) == [*NAMES, NAMES[0]]


def test_without_locks_work_may_be_done_twice_and_is_the_same(
    tmp_path: Path, undisturbed: dict[str, bytes], without_locks: None
) -> None:
    children = [fork(partial(fill, tmp_path / "out", seconds=0.02)) for _ in range(3)]
    assert [ended_well(child) for child in children] == 3 * [True]
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("module, step", [(claims, "write_sealed"), (sys.modules[__name__], "merge")])
def test_without_locks_others_may_finish_in_the_middle_of_a_step(
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    without_locks: None,
    module: ModuleType,
    step: str,
) -> None:
    """Somebody else makes all, and removes `.work`, while this worker lays down the plan, and while it merges."""
    others = [partial(fill, tmp_path / "out")]
    undelayed = getattr(module, step)

    def delayed(*arguments) -> None:
        while others:
            others.pop()()
        undelayed(*arguments)

    monkeypatch.setattr(module, step, delayed)
    fill(tmp_path / "out")
    assert not others and content(tmp_path / "out") == undisturbed


def test_a_file_that_is_missing_for_another_reason_is_named(tmp_path: Path) -> None:
    work = make_claims(tmp_path / "out")
    work.open()
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        work.finish(partial(make_shard, tmp_path / "out"), (tmp_path / "elsewhere").read_bytes)


def test_no_room_is_an_error_and_the_rest_is_done_later(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    def fail_at_the_third(folder: Path, name: str, *, seconds: float) -> Entry:
        entry = make_shard(folder, name)
        if name == NAMES[2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return entry

    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path / "out", make=fail_at_the_third)
    fill(tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed
    assert made(tmp_path / "out") == [*NAMES[:3], *NAMES[2:]]


def shard_beside(entry: Path, suffix: str) -> Path:
    return entry.parent.parent / f"{entry.stem}.{suffix}"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn": lambda entry: entry.write_bytes(entry.read_bytes()[:-9]),
    "empty": lambda entry: entry.write_bytes(b""),
    "changed": lambda entry: entry.write_text(entry.read_text().replace('"samples": 3', '"samples": 2')),
    "of another plan": lambda entry: write_sealed(entry, {**read_sealed(entry), "plan": "0" * 64}),
    "without its shard": lambda entry: shard_beside(entry, "tar").unlink(),
    "with half a shard": lambda entry: os.truncate(shard_beside(entry, "tar"), 1024),
    "without its table": lambda entry: shard_beside(entry, "members").unlink(),
    "with another table": lambda entry: shard_beside(entry, "members").write_bytes(b"another table"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_entry_that_does_not_fit_is_made_again(tmp_path: Path, undisturbed: dict[str, bytes], damage: str) -> None:
    out = tmp_path / "out"
    work = make_claims(out)
    work.open()
    work.work(partial(make_shard, out))
    DAMAGES[damage](out / ".work" / f"{NAMES[3]}.json")
    fill(out)
    assert made(out) == [*NAMES, NAMES[3]]
    assert content(out) == undisturbed


@pytest.mark.parametrize(
    "change, said",
    [
        ({"batch": 32}, "batch 64, now it is 32"),
        ({"views": [1, 3], "batch": 32}, r"views \[1, 2\], now it is \[1, 3\]"),
        ({"device": "cuda"}, "device None, now it is cuda"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(tmp_path: Path, change: dict, said: str) -> None:
    make_claims(tmp_path / "out").open()
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=f"{said}; go on with the same settings and source, or delete"):
        make_claims(tmp_path / "out", {**PLAN, **change}).open()
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("damaged", [b"", b"{}", b"\xff\x00", b'{"plan": {"seed": 1}, "sha256": "0"}', b"[" * 9999])
def test_a_damaged_plan_is_refused(tmp_path: Path, damaged: bytes) -> None:
    make_claims(tmp_path / "out").open()
    (tmp_path / "out/.work/plan.json").write_bytes(damaged)
    with pytest.raises(DamagedData, match="plan.json: damaged, .*; delete .* and start anew"):
        make_claims(tmp_path / "out").open()


def test_work_left_in_a_finished_folder_is_cleaned_by_the_next_start(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    work = make_claims(out)
    work.open()
    work.work(partial(make_shard, out))
    merge(work)  # and killed before it could clean up
    assert (out / ".work").is_dir()
    fill(out)
    assert content(out) == undisturbed and made(out) == list(NAMES)
    forget_finished_work(out)  # nothing left: no error


def test_the_plan_and_who_works_on_what_can_be_read_by_people(tmp_path: Path) -> None:
    work = make_claims(tmp_path / "out")
    work.open()
    work.work(partial(make_shard, tmp_path / "out"))
    assert json.loads((tmp_path / "out/.work/plan.json").read_text())["plan"] == PLAN
    assert f"process {os.getpid()}" in (tmp_path / f"out/.work/{NAMES[0]}.lock").read_text()
