"""One owner at a time, named to whoever comes second, and a dead owner's claim taken over."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from workers import fork, kill, wait_for

from data_pipeline.files import claim
from data_pipeline.files.claim import STALE_SECONDS, Claimed, claimed, claimed_folder

JOB = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}


def owned(folder: Path) -> bool:
    """Whether the folder can be claimed now."""
    try:
        with claimed_folder(folder):
            return True
    except Claimed:
        return False


def left_by(folder: Path, *, age: float = 0.0, **owner: object) -> Path:
    """The claim of a process on another host whose lock does not reach this one."""
    file = folder / claim.NAME
    file.write_text(json.dumps({"host": "elsewhere", "pid": 5, "job": "77", "restarts": 0, "since": 0.0} | owner))
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "run"):
        with pytest.raises(Claimed) as refused, claimed_folder(tmp_path / "run"):
            pass
        assert f"run is being written by process {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        assert refused.value.exit_code == 73
        assert owned(tmp_path / "another")
    assert owned(tmp_path / "run")


def test_a_killed_owner_is_followed_at_once(tmp_path: Path) -> None:
    def hold() -> None:
        with claimed_folder(tmp_path):
            (tmp_path / "held").touch()
            signal.pause()

    child = fork(hold)
    wait_for((tmp_path / "held").exists)
    assert not owned(tmp_path)
    kill(child)
    assert owned(tmp_path)


def test_an_owner_on_another_host_counts_until_its_last_sign_of_life_is_old(tmp_path: Path) -> None:
    left_by(tmp_path, age=STALE_SECONDS - 30)
    with pytest.raises(Claimed, match=re.escape("process 5 on elsewhere, job 77")), claimed_folder(tmp_path):
        pass
    left_by(tmp_path, age=STALE_SECONDS + 30)
    assert owned(tmp_path)
    assert not list(tmp_path.iterdir())  # a claim that is given back leaves no trace


@pytest.mark.parametrize(("job", "restarts", "may"), [("77", 0, True), ("77", 1, False), ("78", 0, False)])
def test_a_job_that_was_requeued_takes_its_own_claim_over(tmp_path: Path, job: str, restarts: int, may: bool) -> None:
    file = left_by(tmp_path, job=job, restarts=restarts)
    if may:
        with claimed(file, tmp_path, JOB):
            assert json.loads(file.read_text())["restarts"] == 1
    else:
        with pytest.raises(Claimed), claimed(file, tmp_path, JOB):
            pass


def test_an_owner_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RENEW_SECONDS", 0.02)
    file = tmp_path / claim.NAME
    with claimed_folder(tmp_path):
        os.utime(file, (0, 0))
        wait_for(lambda: file.stat().st_mtime > 0)
