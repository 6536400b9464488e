"""Faults while checkpoints are written: killed ranks, full disks, damaged files. Old or new, never neither.

Two forked gloo ranks write the few numbers of a plain engine, so that a fault costs half a second. First a recorder
asks which calls of a save change the disk, on which rank; then each of them fails in turn.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from fault_worker import content, content_at, make_engine, open_checkpoints, set_step
from faults import sites_reached
from fork_world import EndedWorld, ForkServer
from malformed_checkpoints import DAMAGES, damage_of, flip

from training.checkpoints import commit
from training.checkpoints.checkpoint import TrainState
from training.engine.distributed import World

RENAMED = "disk.fsync.checkpoints"  # the first call after the commit
FLIPS = 1000


class Point(NamedTuple):
    """A call of a save: the rank that makes it, its site, and the how-manieth of that name it is on that rank."""

    rank: int
    site: str
    count: int

    def fault(self, kind: str) -> str:
        return f"{kind}@{self.site}:rank={self.rank}:count={self.count}"


def save_on_two_ranks(server: ForkServer, root: Path, saves: int, *faults: str) -> EndedWorld:
    return server.run("fault_worker:save_checkpoints", {"root": str(root), "saves": saves}, faults=faults)


def with_checkpoints(folder: Path, steps: int) -> Path:
    """A run's checkpoints after so many steps, written by one process."""
    root = folder / "checkpoints"
    root.mkdir(parents=True)
    engine = make_engine()
    for step in range(1, steps + 1):
        set_step(engine, step)
        open_checkpoints(root, World(), []).save({"model": engine}, TrainState(step=step))
    return root


def resumed(root: Path) -> tuple[int | None, list[str]]:
    """The step from which a new process would go on, its content checked, and what was said about it."""
    said: list[str] = []
    engine = make_engine()
    state = open_checkpoints(root, World(), said).resume({"model": engine})
    if state is None:
        return None, said
    assert content(engine) == content_at(state.step)
    return state.step, said


def points_of_a_save(server: ForkServer, root: Path) -> list[Point]:
    """All calls of the next save that change the disk, in each rank's order."""
    world = save_on_two_ranks(server, root, 1, "record@disk.*")
    assert world.exit_codes == [0, 0], world.explain()
    points = []
    for rank in (0, 1):
        sites = sites_reached(world.fault_log, rank)
        points += [Point(rank, site, sites[: number + 1].count(site)) for number, site in enumerate(sites)]
    return points


def is_after_commit(points: list[Point], point: Point) -> bool:
    return point.rank == 0 and points.index(point) >= points.index(Point(0, RENAMED, 1))


def kill_and_go_on(server: ForkServer, root: Path, point: Point, kind: str, expected: int) -> None:
    """Kill a rank in a save; a new world must resume from the expected step, 0 for none, and be able to save."""
    killed = save_on_two_ranks(server, root, 1, point.fault(kind))
    assert killed.exit_codes[point.rank] == -signal.SIGKILL, killed.explain()
    assert killed.exit_codes[1 - point.rank] not in (0, -signal.SIGKILL), killed.explain()  # it ends by itself, failing
    again = save_on_two_ranks(server, root, 1)
    assert again.exit_codes == [0, 0], again.explain()
    for result in again.results:
        assert result["resumed"] == (expected or None), again.explain()
        assert result["content"] == (content_at(expected) if expected else None)
        assert result["saved"] == [commit.folder_name(expected + 1)] and result["said"] == []
    assert resumed(root) == (expected + 1, [])
    assert not list(root.glob(".*")), "something half-written is left"


def sweep_kills(server: ForkServer, folder: Path, before: int, *, every: int = 1) -> int:
    """Kill every such point of a save that finds `before` checkpoints, and tear the file that it writes; how many."""
    points = points_of_a_save(server, with_checkpoints(folder / "recorded", before))
    faults = [(point, "kill") for point in points]
    faults += [(point, "tear") for point in points if point.site.endswith((".json", ".safetensors"))]
    for number, (point, kind) in enumerate(faults[::every]):
        root = with_checkpoints(folder / str(number), before)
        kill_and_go_on(server, root, point, kind, before + is_after_commit(points, point))
        shutil.rmtree(root)
    return len(faults[::every])


def test_some_kills_leave_the_old_or_the_new_checkpoint(fork_server: ForkServer, tmp_path: Path) -> None:
    assert sweep_kills(fork_server, tmp_path, before=2, every=5) >= 4


@pytest.mark.faults
def test_every_kill_leaves_the_old_or_the_new_checkpoint(
    fork_server: ForkServer, tmp_path: Path, figures: dict[str, str]
) -> None:
    start = time.monotonic()
    kills = sum(sweep_kills(fork_server, tmp_path / str(before), before) for before in (0, 1, 2))
    assert kills >= 40
    figures["checkpoints: SIGKILL during a save, resumed from the old or the new one"] = f"{kills} of {kills}"
    figures["checkpoints: seconds for that sweep"] = f"{time.monotonic() - start:.0f}"


def fail_and_go_on(server: ForkServer, root: Path, point: Point, kind: str, *, is_saved: bool) -> None:
    """One rank's disk fails in the save of step 3, of two: all ranks say so in one line, and step 4 is saved."""
    world = save_on_two_ranks(server, root, 2, point.fault(kind))
    assert world.exit_codes == [0, 0], world.explain()
    saved = ["step-00000003", "step-00000004"] if is_saved else ["step-00000004"]
    assert [result["saved"] for result in world.results] == [saved] * 2, world.explain()
    lines = world.results[0]["said"] if is_saved else world.results[0]["failures"]
    assert len(lines) == 1 and "\n" not in lines[0], world.explain()
    assert os.strerror(getattr(errno, kind.upper())) in lines[0]
    if not is_saved:
        assert world.results[1]["failures"] == lines
        assert f"rank {point.rank}" in lines[0] and "the newest is step-00000002" in lines[0]
        assert damage_of(root / "step-00000002") == ""
    assert resumed(root) == (4, [])
    assert not list(root.glob(".*")), "something half-written is left"


def sweep_errors(server: ForkServer, folder: Path, kinds: tuple[str, ...], *, every: int = 1) -> int:
    points = points_of_a_save(server, with_checkpoints(folder / "recorded", 2))
    for number, point in enumerate(points[::every]):
        for kind in kinds:
            root = with_checkpoints(folder / f"{kind}{number}", 2)
            fail_and_go_on(server, root, point, kind, is_saved=is_after_commit(points, point))
            shutil.rmtree(root)
    return len(points[::every]) * len(kinds)


def test_training_goes_on_after_some_disk_errors(fork_server: ForkServer, tmp_path: Path) -> None:
    assert sweep_errors(fork_server, tmp_path, ("enospc",), every=5) >= 3


@pytest.mark.faults
def test_training_goes_on_after_every_disk_error(
    fork_server: ForkServer, tmp_path: Path, figures: dict[str, str]
) -> None:
    start = time.monotonic()
    points = sweep_errors(fork_server, tmp_path, ("enospc", "eio"))
    figures["checkpoints: ENOSPC and EIO during a save, said in one line"] = f"{points} of {points}"
    figures["checkpoints: seconds for that sweep of errors"] = f"{time.monotonic() - start:.0f}"


def test_a_disk_that_stays_full_costs_every_checkpoint_but_not_the_last_good_one(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    root = with_checkpoints(tmp_path, 2)
    world = save_on_two_ranks(fork_server, root, 3, "enospc@disk.fsync.share*:rank=1:times=3")
    assert [len(result["failures"]) for result in world.results] == [3, 3], world.explain()
    assert resumed(root) == (2, [])


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_all_ranks_pass_a_damaged_checkpoint_over(
    fork_server: ForkServer, tmp_path: Path, figures: dict[str, str], damage: str
) -> None:
    root = with_checkpoints(tmp_path, 2)
    DAMAGES[damage](root / "step-00000002")
    world = save_on_two_ranks(fork_server, root, 1)
    assert [result["resumed"] for result in world.results] == [1, 1], world.explain()
    assert len(world.results[0]["said"]) == 1
    assert resumed(root) == (2, [])
    figures[f"checkpoints: {damage}"] = "previous one used, one line"


def test_every_single_flipped_bit_is_detected(tmp_path: Path, figures: dict[str, str]) -> None:
    folder = with_checkpoints(tmp_path, 1) / "step-00000001"
    draw = random.Random(4)
    files, missed = sorted(path for path in folder.rglob("*") if path.is_file()), []
    for number in range(FLIPS):
        file = files[number % len(files)]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        if not damage_of(folder):
            missed.append((file.name, bit))
        flip(file, bit)
    assert missed == [] and damage_of(folder) == ""
    figures["checkpoints: single flipped bits detected"] = f"{FLIPS} of {FLIPS}, over {len(files)} files"
