"""Conversions killed 20 times at random, and by two workers at once: the same bytes as undisturbed, and no rest."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import Project
from tiny import VQVAE_CONFIG, make_tokenizer
from workers import content

from training.checkpoints.model_on_disk import describe, write_model

KILLS = 20
SHARD = 30  # samples
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Pictures of three classes, some of them no pictures at all, and a tokenizer."""
    project = Project(tmp_path_factory.mktemp("kills"))
    random_numbers = np.random.default_rng(0)
    for number in range(2400):
        path = project.folder / "pictures" / f"class {number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 100 == 7:
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(number % 13))
        else:
            side = int(random_numbers.integers(40, 90))
            Image.fromarray(random_numbers.integers(0, 256, (side, 64, 3), dtype=np.uint8)).save(path, compress_level=0)
    write_model(project.folder / "tokenizer", make_tokenizer().state_dict(), describe(VQVAE_CONFIG))
    return project


def pack(out: str) -> tuple[str, ...]:
    return (
        *["pack_images", "source=pictures", f"out={out}", "val_fraction=0.1"],
        *["resize_short_side=48", f"samples_per_shard={SHARD}"],
    )


def encode(out: str) -> tuple[str, ...]:
    return "encode_codes", "tokenizer=tokenizer", "images=packed", f"out={out}", "views=2", "batch=64"


class Worker:
    """A launcher of its own."""

    def __init__(self, project: Project, *command: str) -> None:
        self.out = project.folder / next(word for word in command if word.startswith("out=")).removeprefix("out=")
        self.process = subprocess.Popen(
            project.command(*command),
            cwd=project.folder,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def works(self) -> bool:
        """Whether it has taken a shard, which it signs with its process id; or has ended."""
        signed = f"process {self.process.pid}\n"
        try:
            has_signed = any(signed in lock.read_text() for lock in self.out.rglob(".work/*.lock"))
        except FileNotFoundError:  # others have finished, and removed the locks
            has_signed = False
        return has_signed or self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def succeed(self) -> None:
        _, said = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, said.decode()[-3000:]


def kill_again_and_again(project: Project, undisturbed: dict[str, bytes], seconds: float, *command: str) -> int:
    """Start one or two workers and kill them, until so many were killed at work; how many shards they have left done.

    seconds: they live after they have begun, at most. When they are done before, theirs is compared too, and another
    folder is begun in its place.
    """
    instants, kills, rounds, done = random.Random(1), 0, 0, 0
    while kills < KILLS:
        workers = [Worker(project, *command) for _ in range(1 + rounds % 2)]
        rounds += 1
        if rounds % 5:  # the others die wherever they are, perhaps before they have begun
            while not all(worker.works() for worker in workers):
                time.sleep(0.005)
        time.sleep(instants.uniform(0.0, seconds))
        for worker in workers:
            kills += worker.process.poll() is None
            worker.kill()
            time.sleep(instants.uniform(0.0, 0.1))
        out = workers[0].out
        done = max(done, len(list(out.rglob(".work/*shard-*.json"))))
        if all(worker.process.returncode == 0 for worker in workers):
            assert content(out) == undisturbed
            shutil.rmtree(out)
    return done


def shards(folder: Path) -> int:
    return len(list(folder.rglob("shard-*.tar")))


@pytest.mark.parametrize("command, whole", [(pack, "packed"), (encode, "codes")], ids=["pack_images", "encode_codes"])
def test_killed_conversions_end_with_the_same_bytes(prepared: Project, figures: dict[str, str], command, whole) -> None:
    started = time.monotonic()
    prepared.succeed(*command(whole))
    seconds = time.monotonic() - started
    undisturbed = content(prepared.folder / whole)
    some_shards = max(1.5, 5 * seconds / shards(prepared.folder / whole))  # the first shard takes longer: imports
    found = kill_again_and_again(prepared, undisturbed, some_shards, *command("killed_" + whole))
    assert found > 0  # what was done was kept
    prepared.succeed(*command("killed_" + whole))
    assert content(prepared.folder / f"killed_{whole}") == undisturbed
    figures[f"{command.__name__}: killed {KILLS} times, then finished"] = (
        f"{len(undisturbed)} files, all byte-identical; undisturbed {seconds:.0f} s; "
        f"up to {found} of {shards(prepared.folder / whole)} shards were there at a start"
    )


@pytest.mark.parametrize("command, whole", [(pack, "packed"), (encode, "codes")], ids=["pack_images", "encode_codes"])
def test_two_workers_at_once_make_the_same_bytes(prepared: Project, command, whole) -> None:
    if not (prepared.folder / whole).exists():
        prepared.succeed(*command(whole))
    workers = [Worker(prepared, *command("shared_" + whole)) for _ in range(2)]
    for worker in workers:
        worker.succeed()
    assert content(prepared.folder / f"shared_{whole}") == content(prepared.folder / whole)
