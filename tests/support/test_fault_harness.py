"""The fault harness itself: faults act where they are meant to, prove that they did, and leave nothing behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import seams
from faults import Fired, fired, install
from fork_world import FaultNeverFired, ForkServer

HELLO = "fault_worker:say_hello"


@pytest.mark.parametrize(
    ("fault", "sites", "acted"),
    [
        ("nan@site.a:count=2:times=2", "abaaa", [2, 3]),
        ("nan@site.*:count=3", "aba", [2]),
        ("nan@site", "ab", []),
        ("nan@site.a:rank=1", "ab", []),
    ],
)
def test_a_fault_acts_at_its_rank_its_sites_and_its_times(
    tmp_path: Path, fault: str, sites: str, acted: list[int]
) -> None:
    try:
        install([fault], rank=0, log=tmp_path / "log")
        passed = [seams.reach(f"site.{letter}", 1.0) for letter in sites]
    finally:
        seams.install(None)
    assert [number for number, value in enumerate(passed) if value != 1] == acted
    assert fired(tmp_path / "log") == [Fired(fault, 0, f"site.{sites[number]}") for number in acted]


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -signal.SIGKILL), ("exit0", 0), ("enospc", 1), ("lock", -signal.SIGKILL)],
)
def test_the_way_a_rank_ends_is_reported(fork_server: ForkServer, kind: str, code: int) -> None:
    """Who hangs is given a grace and then killed."""
    fault = f"{kind}@hello.second:rank=1:count=2"
    world = fork_server.run(HELLO, {"numbers": [1, 2, 3]}, faults=[fault], grace=0.5)
    assert world.exit_codes == [0, code] and world.ranks[1].was_killed == (kind == "lock"), world.explain()
    assert world.results[0] == {"rank": "0", "passed": [[1, 1], [2, 2], [3, 3]]} and world.results[1] is None
    assert world.fired == [Fired(fault, 1, "hello.second")] and world.left_behind == []


def test_a_fault_that_never_fires_fails_its_test(fork_server: ForkServer) -> None:
    with pytest.raises(FaultNeverFired, match="kill@hello.second:count=9 never fired"):
        fork_server.run(HELLO, {"numbers": [1, 2]}, faults=["kill@hello.second:count=9"])
    assert fork_server.run(HELLO, {"numbers": [1]}, faults=["kill@nowhere"], faults_may_miss=True).exit_codes == [0, 0]


def test_processes_that_outlive_their_rank_are_named_and_killed(fork_server: ForkServer) -> None:
    world = fork_server.run(
        "subprocess:Popen", {"args": ["sleep", "60"], "start_new_session": True}, leftover_grace=0.1
    )
    assert len(world.left_behind) == 2 and all("sleep 60" in line for line in world.left_behind)
