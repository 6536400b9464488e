"""Faults while checkpoints are written: killed ranks, full disks, damaged files. Old or new, never neither.

Two forked gloo ranks write the few numbers of a plain engine, so that a fault costs half a second. First a recorder
asks which seams a save passes on which rank; then each of them fails in turn.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_worker import content, content_at, make_engine, open_checkpoints, set_step
from faults import sites_reached
from fork_world import EndedWorld, ForkServer

from training.checkpoints import commit
from training.checkpoints.checkpoint import TrainState
from training.engine.distributed import World

RENAMED = "checkpoint.renamed"  # the first seam after the commit
FLIPS = 1000
SEED = 4


def save_on_two_ranks(server: ForkServer, root: Path, saves: int, *faults: str) -> EndedWorld:
    return server.run("fault_worker:save_checkpoints", {"root": str(root), "saves": saves}, faults=faults)


def with_checkpoints(root: Path, steps: int) -> Path:
    """A run's checkpoints after so many steps, written by one process."""
    root.mkdir(parents=True)
    engine = make_engine()
    for step in range(1, steps + 1):
        set_step(engine, step)
        open_checkpoints(root, World(), []).save({"model": engine}, TrainState(step=step))
    return root


def damage_of(folder: Path) -> str:
    """What is wrong with a checkpoint; empty: nothing."""
    try:
        manifest = commit.read_manifest(folder)
    except commit.DamagedCheckpoint as damage:
        return str(damage)
    return commit.structural_damage(folder) or commit.content_damage(folder, manifest, list(manifest["files"]))


def resumed(root: Path) -> tuple[int | None, list[str]]:
    """The step from which a new process would go on, its content checked, and what was said about it."""
    said: list[str] = []
    engine = make_engine()
    state = open_checkpoints(root, World(), said).resume({"model": engine})
    if state is None:
        return None, said
    assert content(engine) == content_at(state.step)
    return state.step, said


def seams_of_a_save(server: ForkServer, root: Path) -> list[tuple[int, str, int]]:
    """(rank, site, the how-manieth time) of every seam that the next save passes, in each rank's order."""
    world = save_on_two_ranks(server, root, 1, "record@checkpoint.*")
    assert world.exit_codes == [0, 0], world.explain()
    passed = []
    for rank in (0, 1):
        sites = sites_reached(world.fault_log, rank)
        passed += [(rank, site, sites[: number + 1].count(site)) for number, site in enumerate(sites)]
    return passed


def is_after_commit(seams: list[tuple[int, str, int]], seam: tuple[int, str, int]) -> bool:
    return seam[0] == 0 and seams.index(seam) >= seams.index((0, RENAMED, 1))


def kill_and_go_on(server: ForkServer, root: Path, seam: tuple[int, str, int], *, expected: int | None) -> None:
    """Kill a rank in a save; a new world must resume from the expected step and be able to save."""
    rank, site, count = seam
    killed = save_on_two_ranks(server, root, 1, f"kill@{site}:rank={rank}:count={count}")
    assert killed.exit_codes[rank] == -signal.SIGKILL, killed.explain()
    assert killed.exit_codes[1 - rank] not in (0, -signal.SIGKILL), killed.explain()  # it ends by itself, failing
    again = save_on_two_ranks(server, root, 1)
    assert again.exit_codes == [0, 0], again.explain()
    for result in again.results:
        assert result["resumed"] == expected, again.explain()
        assert result["content"] == (content_at(expected) if expected else None)
        assert result["saved"] == [commit.folder_name((expected or 0) + 1)] and result["said"] == []
    assert resumed(root) == ((expected or 0) + 1, [])
    assert not list(root.glob(".*")), "something half-written is left"


def sweep_kills(server: ForkServer, folder: Path, before: int, *, every: int = 1) -> int:
    """Kill every such seam of a save that finds `before` checkpoints; how many."""
    seams = seams_of_a_save(server, with_checkpoints(folder / "recorded", before))
    for number, seam in enumerate(seams[::every]):
        root = with_checkpoints(folder / str(number), before)
        expected = before + 1 if is_after_commit(seams, seam) else before or None
        kill_and_go_on(server, root, seam, expected=expected)
        shutil.rmtree(root)
    return len(seams[::every])


def test_some_kills_leave_the_old_or_the_new_checkpoint(fork_server: ForkServer, tmp_path: Path) -> None:
    assert sweep_kills(fork_server, tmp_path, before=2, every=5) >= 6


@pytest.mark.faults
def test_every_kill_leaves_the_old_or_the_new_checkpoint(
    fork_server: ForkServer, tmp_path: Path, figures: dict[str, str]
) -> None:
    start = time.monotonic()
    points = sum(sweep_kills(fork_server, tmp_path / str(before), before) for before in (0, 1, 2))
    assert points >= 40
    figures["checkpoints: SIGKILL during a save, resumed from the old or the new one"] = f"{points} of {points}"
    figures["checkpoints: seconds for that sweep"] = f"{time.monotonic() - start:.0f}"


def fail_and_go_on(server: ForkServer, root: Path, seam: tuple[int, str, int], kind: str, *, is_saved: bool) -> None:
    """One rank's disk fails in the save of step 3, of two: all ranks say so in one line, and step 4 is saved."""
    rank, site, count = seam
    world = save_on_two_ranks(server, root, 2, f"{kind}@{site}:rank={rank}:count={count}")
    assert world.exit_codes == [0, 0], world.explain()
    saved = ["step-00000003", "step-00000004"] if is_saved else ["step-00000004"]
    assert [result["saved"] for result in world.results] == [saved] * 2, world.explain()
    lines = world.results[0]["said"] if is_saved else world.results[0]["failures"]
    assert len(lines) == 1 and "\n" not in lines[0], world.explain()
    assert os.strerror(getattr(errno, kind.upper())) in lines[0]
    if not is_saved:
        assert world.results[1]["failures"] == lines
        assert f"rank {rank}" in lines[0] and "the newest is step-00000002" in lines[0]
        assert damage_of(root / "step-00000002") == ""
    assert resumed(root) == (4, [])
    assert not list(root.glob(".*")), "something half-written is left"


def sweep_errors(server: ForkServer, folder: Path, kinds: tuple[str, ...], *, every: int = 1) -> int:
    seams = seams_of_a_save(server, with_checkpoints(folder / "recorded", 2))
    for number, seam in enumerate(seams[::every]):
        for kind in kinds:
            root = with_checkpoints(folder / f"{kind}{number}", 2)
            fail_and_go_on(server, root, seam, kind, is_saved=is_after_commit(seams, seam))
            shutil.rmtree(root)
    return len(seams[::every]) * len(kinds)


def test_training_goes_on_after_some_disk_errors(fork_server: ForkServer, tmp_path: Path) -> None:
    assert sweep_errors(fork_server, tmp_path, ("enospc",), every=6) >= 4


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
    root = with_checkpoints(tmp_path / "run", 2)
    world = save_on_two_ranks(fork_server, root, 3, "enospc@checkpoint.state.torn:rank=1:times=3")
    assert [len(result["failures"]) for result in world.results] == [3, 3], world.explain()
    assert resumed(root) == (2, [])


def share_of(folder: Path) -> Path:
    return next(folder.glob("state/*.safetensors"))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0] ^ (1 << bit % 8)
        file.seek(bit // 8)
        file.write(bytes([byte]))


def cut(path: Path, *, keep: float) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file cut to nothing": lambda folder: cut(share_of(folder), keep=0),
    "a file cut in half": lambda folder: cut(folder / "weights" / "model.safetensors", keep=0.5),
    "a flipped bit": lambda folder: flip(share_of(folder), 8 * share_of(folder).stat().st_size - 1),
    "a missing share": lambda folder: share_of(folder).unlink(),
    "a share too many": lambda folder: shutil.copy(share_of(folder), folder / "state" / "share-of-nobody.safetensors"),
    "a manifest of garbage": lambda folder: (folder / commit.MANIFEST).write_bytes(bytes(range(256))),
    "the manifest of another step": lambda folder: shutil.copy(
        folder.with_name("step-00000001") / commit.MANIFEST, folder / commit.MANIFEST
    ),
    "an empty manifest": lambda folder: cut(folder / commit.MANIFEST, keep=0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_in_one_line(tmp_path: Path, damage: str) -> None:
    root = with_checkpoints(tmp_path / "run", 2)
    DAMAGES[damage](root / "step-00000002")
    step, said = resumed(root)
    assert step == 1
    assert len(said) == 1 and "\n" not in said[0], said
    assert str(root / "step-00000002") in said[0] and "falling back to step-00000001" in said[0]


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_all_ranks_pass_a_damaged_checkpoint_over(
    fork_server: ForkServer, tmp_path: Path, figures: dict[str, str], damage: str
) -> None:
    root = with_checkpoints(tmp_path / "run", 2)
    DAMAGES[damage](root / "step-00000002")
    world = save_on_two_ranks(fork_server, root, 1)
    assert [result["resumed"] for result in world.results] == [1, 1], world.explain()
    assert len(world.results[0]["said"]) == 1
    assert resumed(root) == (2, [])
    figures[f"checkpoints: {damage}"] = "previous one used, one line"


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def test_every_single_flipped_bit_is_detected(tmp_path: Path, figures: dict[str, str]) -> None:
    folder = with_checkpoints(tmp_path / "run", 1) / "step-00000001"
    assert damage_of(folder) == ""
    draw = random.Random(SEED)
    files, missed = list(files_of(folder)), []
    for number in range(FLIPS):
        file = files[number % len(files)]
        bit = draw.randrange(8 * file.stat().st_size)
        flip(file, bit)
        if not damage_of(folder):
            missed.append((file.name, bit))
        flip(file, bit)
    assert missed == [] and damage_of(folder) == ""
    figures["checkpoints: single flipped bits detected"] = f"{FLIPS} of {FLIPS}, over {len(files)} files"


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """A manifest with any one bit flipped does not fit its seal, or is no JSON."""
    folder = with_checkpoints(tmp_path / "run", 1) / "step-00000001"
    manifest = folder / commit.MANIFEST
    assert json.loads(manifest.read_bytes())["step"] == 1
    for bit in range(0, 8 * manifest.stat().st_size, 7):
        flip(manifest, bit)
        with pytest.raises(commit.DamagedCheckpoint):
            commit.read_manifest(folder)
        flip(manifest, bit)
