"""The fault harness itself: faults by name, proof that they fired, forked worlds that leave nothing behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import seams
import torch
from faults import KINDS, Fault, Fired, fired, install, sites_reached
from fork_world import FaultNeverFired, ForkServer

HELLO = "fault_worker:say_hello"


@pytest.fixture(autouse=True)
def no_fault_is_left() -> Iterator[None]:
    yield
    seams.install(None)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "faults.jsonl"


def pass_seams(log: Path, fault: str, *, sites: str) -> list[float]:
    """What comes out of the seams named by single letters when 1.0 goes in."""
    install([fault], rank=0, log=log)
    return [seams.reach(f"site.{letter}", 1.0) for letter in sites]


@pytest.mark.parametrize(
    "text", ["kill@disk.rename.*", "nan@loop.loss:rank=1:count=3:times=2", "sleep@data.*:seconds=2.5"]
)
def test_a_fault_is_written_as_it_is_read(text: str) -> None:
    assert str(Fault.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("melt@site", f"kind 'melt'; accepted: {', '.join(KINDS)}"),
        ("kill", "at site ''"),
        ("kill@a.*.b", "at site 'a.*.b'"),
        ("kill@a:when=3", "accepted: rank, count, times, seconds"),
        ("kill@a:count=0", "with count 0"),
    ],
)
def test_a_fault_that_is_none_is_refused_naming_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="^a? ?fault") as caught:
        Fault.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "sites", "acted"),
    [
        ("nan@site.a:count=2", "abaa", [2]),
        ("nan@site.a:count=2:times=2", "aaaa", [1, 2]),
        ("nan@site.*:count=3", "aba", [2]),
        ("nan@site", "ab", []),
        ("nan@site.a:rank=1", "ab", []),
        ("record@site.*", "aba", []),
    ],
)
def test_a_fault_acts_at_its_rank_its_sites_and_its_times(log: Path, fault: str, sites: str, acted: list[int]) -> None:
    passed = pass_seams(log, fault, sites=sites)
    assert [number for number, value in enumerate(passed) if value != 1] == acted
    proof = range(len(sites)) if fault.startswith("record") else acted
    assert fired(log) == [Fired(fault, 0, f"site.{sites[number]}") for number in proof]


def test_the_recorder_tells_the_sites_of_a_rank_in_order(log: Path) -> None:
    pass_seams(log, "record@site.*", sites="aba")
    assert sites_reached(log, rank=0) == ["site.a", "site.b", "site.a"] and sites_reached(log, rank=1) == []


def test_a_false_number_has_false_gradients(log: Path) -> None:
    install(["nan@loss"], rank=0, log=log)
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    seams.reach("loss", weight.sum()).backward()
    assert weight.grad.isnan().all()


def test_ranks_know_their_place_and_return_what_they_found(fork_server: ForkServer) -> None:
    world = fork_server.run(HELLO, {"numbers": [1, 2]}, world_size=3)
    assert world.exit_codes == [0, 0, 0], world.explain()
    assert [result["rank"] for result in world.results] == ["0", "1", "2"]
    assert world.results[0]["passed"] == [[1, 1], [2, 2]]
    assert world.fired == [] and world.left_behind == []


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -signal.SIGKILL), ("term", -signal.SIGTERM), ("segv", -signal.SIGSEGV), ("abort", -signal.SIGABRT)]
    + [("exit0", 0), ("exception", 1), ("enospc", 1)],
)
def test_the_way_a_rank_ends_is_reported(fork_server: ForkServer, kind: str, code: int) -> None:
    fault = f"{kind}@hello.second:rank=1:count=2"
    world = fork_server.run(HELLO, {"numbers": [1, 2, 3]}, faults=[fault])
    assert world.exit_codes == [0, code], world.explain()
    assert world.results[1] is None
    assert world.fired == [Fired(fault, 1, "hello.second")]
    assert ("Traceback" in world.ranks[1].stderr) == (code == 1)


@pytest.mark.parametrize("kind", ["sleep", "lock"])
def test_who_hangs_is_given_a_grace_and_then_killed(fork_server: ForkServer, kind: str) -> None:
    world = fork_server.run(HELLO, {"numbers": [1]}, faults=[f"{kind}@hello.first:rank=1"], grace=0.3)
    assert world.exit_codes == [0, -signal.SIGKILL] and not world.timed_out
    assert [rank.was_killed for rank in world.ranks] == [False, True]
    assert 0.3 < world.seconds < 5


def test_a_world_that_takes_too_long_is_ended(fork_server: ForkServer) -> None:
    world = fork_server.run(HELLO, {"numbers": [1]}, faults=["sleep@hello.first"], timeout=0.3)
    assert world.exit_codes == [-signal.SIGKILL] * 2 and world.timed_out


def test_a_rank_that_holds_the_lock_hears_no_signal(fork_server: ForkServer) -> None:
    world = fork_server.start(HELLO, {"numbers": [1]}, world_size=1, faults=["lock@hello.first"], timeout=0.8)
    time.sleep(0.3)
    world.send(signal.SIGTERM, rank=0)
    assert world.wait().exit_codes == [-signal.SIGKILL]


def test_a_fault_that_never_fires_fails_its_test(fork_server: ForkServer) -> None:
    with pytest.raises(FaultNeverFired, match="kill@hello.second:count=9 never fired"):
        fork_server.run(HELLO, {"numbers": [1, 2]}, faults=["kill@hello.second:count=9"])
    assert fork_server.run(HELLO, {"numbers": [1]}, faults=["kill@nowhere"], faults_may_miss=True).exit_codes == [0, 0]


def test_processes_that_outlive_their_rank_are_named_and_killed(fork_server: ForkServer) -> None:
    world = fork_server.run("fault_worker:start_a_process", {"seconds": 60}, leftover_grace=0.1)
    assert world.exit_codes == [0, 0]
    assert len(world.left_behind) == 2 and all("sleep 60" in line for line in world.left_behind)
    for pid in world.results:
        assert not Path(f"/proc/{pid}").exists()


def test_a_world_that_a_failed_test_left_running_is_ended_by_the_next(fork_server: ForkServer) -> None:
    fork_server.start(HELLO, {"numbers": [1]}, faults=["sleep@hello.first"])
    assert fork_server.run(HELLO, {"numbers": [1]}).exit_codes == [0, 0]


def test_ranks_end_with_their_server(tmp_path: Path) -> None:
    with ForkServer(tmp_path, preload=()) as server:
        world = server.start("signal:pause", {})
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in world.pids):
        assert time.monotonic() < deadline, world.pids
        time.sleep(0.01)
