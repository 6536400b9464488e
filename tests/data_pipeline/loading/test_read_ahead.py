"""Reading ahead is map(): the same results in the same order, errors included, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from repository import ROOT
from tiny import open_codes, pack_codes

from data_pipeline.loading import read_ahead
from data_pipeline.loading.datasets import CodeDataset
from data_pipeline.loading.loader import train_batches
from data_pipeline.loading.read_ahead import ReadAhead, WorkerFailed


@pytest.fixture
def codes(tmp_path: Path) -> CodeDataset:
    return open_codes(pack_codes(tmp_path / "codes"))


def positions(codes: CodeDataset, *, num_steps: int, samples_seen: int = 0, workers: int = 0) -> list[int]:
    share = {"batch_size": 2, "rank": 0, "world_size": 1, "samples_seen": samples_seen, "seed": 0}
    batches = train_batches(codes, **share, workers=workers)
    return torch.cat([batch.positions for batch in islice(batches, num_steps)]).tolist()


def square_unless_13(number: int) -> int:
    if number == 13:
        raise ValueError("13 is damaged")
    return number**2


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_requests(workers: int) -> None:
    assert list(ReadAhead(square_unless_13, iter(range(12)), workers=workers)) == [i**2 for i in range(12)]


def test_requests_need_no_end() -> None:
    results = ReadAhead(square_unless_13, count(20), workers=2)
    assert list(islice(results, 5)) == [400, 441, 484, 529, 576]
    results.close()


def test_an_error_comes_in_its_turn_and_ends_the_workers() -> None:
    others = child_processes()
    results = ReadAhead(square_unless_13, count(11), workers=2)
    assert [next(results), next(results)] == [121, 144]
    with pytest.raises(ValueError, match="^13 is damaged$"):
        next(results)
    assert list(results) == [] and child_processes() <= others


def child_processes() -> set[int]:
    return {process.pid for process in active_children()}


def test_workers_do_not_touch_the_global_generator(codes: CodeDataset) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    positions(codes, num_steps=2, workers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_outlive_a_signal_to_the_job_and_stop_when_closed(codes: CodeDataset) -> None:
    others = child_processes()
    batches = train_batches(codes, batch_size=2, rank=0, world_size=1, samples_seen=0, seed=0, workers=1)
    next(batches)
    children = child_processes() - others
    for child in children:
        os.kill(child, signal.SIGTERM)
    expected = positions(codes, num_steps=6, samples_seen=2)
    assert torch.cat([batch.positions for batch in islice(batches, 6)]).tolist() == expected
    batches.close()
    assert len(children) == 1 and not children & child_processes()
    assert list(batches) == []


@pytest.mark.parametrize("ending", ["", "raise RuntimeError('the trainer failed')"])
def test_a_program_that_holds_its_batches_to_the_end_still_ends(tmp_path: Path, ending: str) -> None:
    pack_codes(tmp_path / "codes")
    program = (
        "from pathlib import Path; from data_pipeline.loading.datasets import *; from data_pipeline.loading.loader import *\n"
        f"folder = Path({str(tmp_path / 'codes')!r})\n"
        "data = CodeDataset(folder, patch_nums=(1, 2), vocab_size=64, tokenizer_sha256=None)\n"
        "batches = train_batches(data, batch_size=2, rank=0, world_size=1, samples_seen=0, seed=0, workers=2)\n"
        "held = batches._results  # as a traceback would\n"
        f"print(next(batches).labels.shape)\n{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "torch.Size([2])" in done.stdout and done.returncode == (1 if ending else 0)
    assert done.stderr == "" or "the trainer failed" in done.stderr


def slow_from_13(number: int) -> int:
    if number >= 13:
        time.sleep(30)
    return number


def test_a_worker_that_was_killed_is_one_line_in_its_turn() -> None:
    others = child_processes()
    results = ReadAhead(slow_from_13, count(12), workers=1)
    assert next(results) == 12
    (worker,) = child_processes() - others
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.1)  # nothing is raised here, where the trainer may be in the middle of a save
    with pytest.raises(WorkerFailed) as caught:
        next(results)
    assert str(caught.value).startswith(f"data worker (pid {worker}) was killed by SIGKILL; next to come was 13")
    assert list(results) == [] and child_processes() <= others


def test_a_worker_that_is_stuck_is_one_line_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "TIMEOUT_SECONDS", 1.5)
    others = child_processes()
    results = ReadAhead(slow_from_13, count(13), workers=2)
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match="has been silent for 1.5 s; next to come was 13; look at the storage"):
        next(results)
    assert time.monotonic() - start < 5
    assert child_processes() <= others


def test_a_slow_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "LOOK_SECONDS", 0.1)
    assert list(ReadAhead(slowly, iter(range(3)), workers=1)) == [0, 1, 2]


def slowly(number: int) -> int:
    time.sleep(0.4)
    return number


def test_an_error_of_the_program_keeps_its_kind() -> None:
    results = ReadAhead(divide, iter([0]), workers=1)
    with pytest.raises(ZeroDivisionError):
        next(results)
    results.close()


def divide(number: int) -> float:
    return 1 / number


def test_workers_do_not_outlive_a_trainer_that_was_killed(tmp_path: Path) -> None:
    """Also one that is in the middle of a read, and so does not look around."""
    trainer = os.fork()
    if trainer == 0:
        others = child_processes()
        results = ReadAhead(slow_from_13, count(13), workers=2)
        (tmp_path / "workers.tmp").write_text(" ".join(map(str, child_processes() - others)))
        (tmp_path / "workers.tmp").rename(tmp_path / "workers")
        next(results)
        os._exit(1)
    while not (tmp_path / "workers").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    workers = [Path(f"/proc/{pid}/stat") for pid in (tmp_path / "workers").read_text().split()]
    end = time.monotonic() + 2
    while time.monotonic() < end and any(runs(stat) for stat in workers):
        time.sleep(0.01)
    assert workers and not any(runs(stat) for stat in workers)


def runs(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
