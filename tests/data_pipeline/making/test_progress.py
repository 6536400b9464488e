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
    lines: list[str] = []
    progress = Progress(work, SIZES, report=lines.append)
    for name in NAMES[:4]:
        for _ in progress.counted(range(100), lambda image: 2000):
            clock.now += 0.125
        finish(work, name)
    assert len(lines) == 9 and "0 of 6 shards done, 41 of 600 images, " in lines[0]
    assert lines[2].endswith("1 of 6 shards done, 121 of 600 images, 8 images/s and 0.0 MB/s here, about 59 s left")
    assert progress.summary() == "400 images by this process in 50 s: 8 images/s and 0.0 MB/s here"


def test_the_time_left_counts_what_others_do_and_not_what_was_there(work: Claims, clock: Clock) -> None:
    finish(work, *NAMES[:2])
    lines: list[str] = []
    images = Progress(work, SIZES, report=lines.append).counted(range(50), lambda image: 0)
    next(images)
    finish(work, NAMES[5])  # by another
    clock.now += 10.0
    next(images)
    assert "3 of 6 shards done, 302 of 600 images, 0 images/s" in lines[0]
    assert lines[0].endswith("about 29 s left")  # 102 in 10 s together, 298 to go
