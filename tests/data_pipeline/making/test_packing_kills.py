"""Packing that is killed, shared, hindered by the disk or taken up with other options goes on, or says why not."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from image_folders import encoded, make_folder, noise
from tiny import PACK_OPTIONS
from workers import content

from data_pipeline.making.packing import is_packed, pack_images


def start(*arguments: Any, operations: int = 0) -> int:
    """Start a process that packs, and kills itself at that many operations on files, unless it is 0; its number."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(60)
    left = itertools.count(operations - 1, -1)

    def killing(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs) if function is not os.fsync else None

        return call

    try:
        os.fsync, os.replace = killing(os.fsync), killing(os.replace)  # without waiting for the disk
        pack_images(*arguments, **PACK_OPTIONS)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_instant_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    (source / "cat/notes.txt").write_text("not an image")
    pack_images(str(source), tmp_path / "whole", **PACK_OPTIONS)
    ends = []
    while not is_packed(tmp_path / "killed"):  # a little further each time
        ends.append(end_of(start(str(source), tmp_path / "killed", operations=len(ends) + 1)))
    assert set(ends[:-1]) == {-signal.SIGKILL} and len(ends) > 8
    pack_images(str(source), tmp_path / "killed", **PACK_OPTIONS)  # of a kill after the last index `.work` is left
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.faults
def test_killed_at_every_single_instant_it_goes_on(tmp_path: Path, figures: dict[str, str]) -> None:
    source = make_folder(tmp_path / "images")
    (source / "cat/notes.txt").write_text("not an image")
    pack_images(str(source), tmp_path / "whole", **PACK_OPTIONS)
    for operations in itertools.count(1):
        killed = tmp_path / f"killed-{operations}"
        end = end_of(start(str(source), killed, operations=operations))
        pack_images(str(source), killed, **PACK_OPTIONS)
        assert content(killed) == content(tmp_path / "whole")
        if end == 0:
            break
    assert operations > 50
    figures["packing killed at each of its file operations, then continued"] = f"{operations - 1} times the same bytes"


def test_two_workers_at_once_share_the_work_and_make_the_same_bytes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    pack_images(str(source), tmp_path / "whole", **PACK_OPTIONS)
    workers = [start(str(source), tmp_path / "shared"), start(str(source), tmp_path / "shared", operations=14)]
    assert end_of(workers[0]) == 0 and end_of(workers[1]) in (0, -signal.SIGKILL)
    assert content(tmp_path / "shared") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"samples_per_shard": 5}, "samples_per_shard 4, now it is 5"),
        ({"val_fraction": 0.5}, "val_fraction 0.25, now it is 0.5"),
        ({"resize_short_side": 6}, "encoding original files, now it is original files, those .* scaled down, .* 95"),
    ],
)
def test_going_on_with_other_options_is_refused_by_name(tmp_path: Path, change: dict, reason: str) -> None:
    source = str(make_folder(tmp_path / "images"))
    assert end_of(start(source, tmp_path / "packed", operations=20)) == -signal.SIGKILL
    before = content(tmp_path / "packed")
    with pytest.raises(ValueError, match=f"work under way there has {reason}; go on with the same settings and source"):
        pack_images(source, tmp_path / "packed", **{**PACK_OPTIONS, **change})
    assert content(tmp_path / "packed") == before


def test_a_file_that_the_storage_fails_to_read_stops_the_packing_and_is_not_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(make_folder(tmp_path / "images"))
    monkeypatch.setattr(os, "fstat", failing := Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error: .*images/(cat|dog)/image.*png"):
        pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    assert failing.called
    monkeypatch.undo()
    assert pack_images(source, tmp_path / "packed", **PACK_OPTIONS).train.meta["skipped"] == 0


def test_going_on_with_a_source_that_has_changed_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "images")
    assert end_of(start(str(source), tmp_path / "packed", operations=20)) == -signal.SIGKILL
    (source / "cat/one-more.png").write_bytes(encoded(noise(9, 12)))
    with pytest.raises(ValueError, match="has listing 16 files of .* bytes, sha256 .*, now it is 17 files of "):
        pack_images(str(source), tmp_path / "packed", **PACK_OPTIONS)


def test_a_full_disk_leaves_a_folder_that_goes_on(tmp_path: Path) -> None:
    source = str(make_folder(tmp_path / "images"))
    pack_images(source, tmp_path / "whole", **PACK_OPTIONS)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))  # a shard has 10,240 bytes
        try:
            pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
        except OSError as error:
            os._exit(error.errno if "shard-000000" in str(error.filename) else 1)
        os._exit(0)
    assert end_of(pid) == errno.EFBIG
    assert not list((tmp_path / "packed").rglob("*.tmp-*")) and not is_packed(tmp_path / "packed")
    pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    assert content(tmp_path / "packed") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["train/index.json", "val/shard-000000.tar"])
def test_shards_of_somebody_else_are_not_overwritten(tmp_path: Path, name: str) -> None:
    source = str(make_folder(tmp_path / "images"))
    (tmp_path / "packed" / name).parent.mkdir(parents=True)
    (tmp_path / "packed" / name).write_text("of somebody else")
    with pytest.raises(ValueError, match=f"{name}: is there already, .* no work is under way; delete"):
        pack_images(source, tmp_path / "packed", **PACK_OPTIONS)
    assert content(tmp_path / "packed") == {name: b"of somebody else"}
