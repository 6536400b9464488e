"""Reading ahead is map(): the same results in the same order, errors included, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import count, islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from tiny import open_codes, pack_codes

from data_pipeline.loader import CodeDataset, train_batches
from data_pipeline.read_ahead import ReadAhead


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
        "from pathlib import Path; from data_pipeline.loader import *\n"
        f"folder = Path({str(tmp_path / 'codes')!r})\n"
        "data = CodeDataset(folder, patch_nums=(1, 2), vocab_size=64, tokenizer_sha256=None)\n"
        "batches = train_batches(data, batch_size=2, rank=0, world_size=1, samples_seen=0, seed=0, workers=2)\n"
        "held = batches._results  # as a traceback would\n"
        f"print(next(batches).labels.shape)\n{ending}\n"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert "torch.Size([2])" in done.stdout and done.returncode == (1 if ending else 0)
    assert done.stderr == "" or "the trainer failed" in done.stderr
