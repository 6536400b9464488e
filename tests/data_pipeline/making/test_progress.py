"""Progress: what all workers have done, how fast, and when the rest will be."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from claimed_shards import NAMES, make_claims, make_shard

from data_pipeline.making import progress
from data_pipeline.making.claims import Claims
from data_pipeline.making.progress import Progress

SIZES = dict.fromkeys(NAMES, 100)  # 600 images


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def work(tmp_path: Path) -> Claims:
    work = make_claims(tmp_path / "out")
    work.open()
    return work


def finish(work: Claims, *names: str) -> None:
    part = Claims(work.folder, names, plan=work.plan, is_finished=work.is_finished, report=work.report)
    part.work(partial(make_shard, work.folder))


def test_a_line_every_few_seconds_with_rate_and_time_left(work: Claims, clock: Clock) -> None:
    said: list[str] = []
    progress = Progress(work, SIZES, report=said.append, every_seconds=5.0)
    progress.begin_shard()
    for _ in range(40):
        clock.now += 1.0
        progress.add(10, 20_000)
        if progress.images % 100 == 0:
            finish(work, NAMES[progress.images // 100 - 1])
            progress.begin_shard()
    assert len(said) == 8
    assert said[2].endswith("1 of 6 shards done, 150 of 600 images, 10 images/s and 0.0 MB/s here, about 45 s left")
    assert progress.summary() == "400 images by this process in 40 s: 10 images/s and 0.0 MB/s here"


def test_the_time_left_counts_what_others_do_and_not_what_was_there(work: Claims, clock: Clock) -> None:
    finish(work, *NAMES[:2])
    progress = Progress(work, SIZES, report=print)
    progress.begin_shard()
    clock.now += 10.0
    progress.add(50, 0)
    finish(work, NAMES[5])  # by another
    assert "3 of 6 shards done, 350 of 600 images, 5 images/s" in progress.line()
    assert progress.line().endswith("about 17 s left")  # 150 in 10 s together, 250 to go


def test_nothing_done_yet_is_no_division_by_zero(work: Claims, clock: Clock) -> None:
    line = Progress(work, SIZES, report=print).line()
    assert "0 of 6 shards done, 0 of 600 images" in line
