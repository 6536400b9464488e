"""The fault harness itself: faults by name, proof that they fired, forked worlds that leave nothing behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import KINDS, Fault, Fired, InjectedFault, fired, install, sites_reached
from fork_world import FaultNeverFired, ForkServer

from training import seams

HELLO = "fault_worker:say_hello"


@pytest.fixture(autouse=True)
def no_fault_is_left() -> Iterator[None]:
    yield
    seams.install(None)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "faults.jsonl"


def pass_seams(log: Path, *faults: str, rank: int = 0, sites: str = "aab") -> list[float]:
    """What comes out of the seams named by single letters when 1.0 goes in."""
    install(faults, rank=rank, log=log)
    return [seams.reach(f"site.{letter}", 1.0) for letter in sites]


@pytest.mark.parametrize(
    "text", ["kill@checkpoint.rename", "nan@loop.loss:rank=1:count=3:times=2", "sleep@data.*:seconds=2.5"]
)
def test_a_fault_is_written_as_it_is_read(text: str) -> None:
    assert str(Fault.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("melt@site", f"kind 'melt'; accepted: {', '.join(KINDS)}"),
        ("kill", "at site ''"),
        ("kill@a.*.b", "at site 'a.*.b'"),
        ("kill@a:when=3", "has option 'when=3'; accepted: rank, count, times, seconds"),
        ("kill@a:count=0", "with count 0"),
    ],
)
def test_a_fault_that_is_none_is_refused_naming_what_is_accepted(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="^a? ?fault") as caught:
        Fault.parse(text)
    assert said in str(caught.value)


def test_a_fault_acts_the_time_it_is_told_to_and_leaves_proof(log: Path) -> None:
    assert pass_seams(log, "spike@site.a:count=2", sites="abaa") == [1, 1, 1000, 1]
    assert fired(log) == [Fired("spike@site.a:count=2", 0, "site.a")]


def test_a_fault_may_act_several_times_in_a_row(log: Path) -> None:
    assert pass_seams(log, "spike@site.a:count=2:times=2", sites="aaaa") == [1, 1000, 1000, 1]
    assert len(fired(log)) == 2


def test_a_prefix_counts_all_sites_that_begin_so(log: Path) -> None:
    assert pass_seams(log, "spike@site.*:count=3", sites="aba") == [1, 1, 1000]
    assert [line.site for line in fired(log)] == ["site.a"]


def test_a_name_that_only_begins_alike_is_another_site(log: Path) -> None:
    assert pass_seams(log, "spike@site", sites="ab") == [1, 1]


def test_the_fault_of_another_rank_does_not_act(log: Path) -> None:
    assert pass_seams(log, "spike@site.a:rank=1", rank=0) == [1, 1, 1]
    assert pass_seams(log, "spike@site.a:rank=1", rank=1) == [1000, 1, 1]
    assert [line.rank for line in fired(log)] == [1]


def test_the_recorder_lists_every_site_and_changes_nothing(log: Path) -> None:
    assert pass_seams(log, "record@site.*", sites="aba") == [1, 1, 1]
    assert sites_reached(log, rank=0) == ["site.a", "site.b", "site.a"]
    assert sites_reached(log, rank=1) == []


@pytest.mark.parametrize(("kind", "number"), [("enospc", 28), ("eio", 5), ("eacces", 13)])
def test_errors_are_those_of_the_system(log: Path, kind: str, number: int) -> None:
    with pytest.raises(OSError) as caught:
        pass_seams(log, f"{kind}@site.a")
    assert caught.value.errno == number and os.strerror(number) in str(caught.value)


def test_an_exception_names_its_fault(log: Path) -> None:
    with pytest.raises(InjectedFault, match="exception@site.b"):
        pass_seams(log, "exception@site.b")


@pytest.mark.parametrize("kind", ["nan", "inf", "spike"])
def test_numbers_are_falsified_with_their_gradients(log: Path, kind: str) -> None:
    install([f"{kind}@loss"], rank=0, log=log)
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = seams.reach("loss", weight.sum())
    loss.backward()
    assert loss.isfinite() == (kind == "spike") and weight.grad[0].isfinite() == (kind == "spike")
    assert loss != 5


def test_a_seam_without_a_value_has_no_number_to_falsify(log: Path) -> None:
    install(["nan@site"], rank=0, log=log)
    with pytest.raises(TypeError, match="no number passes the seam 'site'"):
        seams.reach("site")


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


@pytest.mark.parametrize("kind", ["stop", "sleep", "lock"])
def test_who_hangs_is_given_a_grace_and_then_killed(fork_server: ForkServer, kind: str) -> None:
    world = fork_server.run(HELLO, {"numbers": [1]}, faults=[f"{kind}@hello.first:rank=1"], grace=0.3)
    assert world.exit_codes == [0, -signal.SIGKILL] and not world.timed_out
    assert [rank.was_killed for rank in world.ranks] == [False, True]
    assert 0.3 < world.seconds < 5


def test_a_world_that_takes_too_long_is_ended(fork_server: ForkServer) -> None:
    world = fork_server.run(HELLO, {"numbers": [1]}, faults=["sleep@hello.first"], timeout=0.3)
    assert world.exit_codes == [-signal.SIGKILL] * 2 and world.timed_out


def test_a_rank_that_holds_the_lock_hears_no_signal(fork_server: ForkServer) -> None:
    world = fork_server.start(HELLO, {"numbers": [1]}, world_size=1, faults=["lock@hello.first"], timeout=1.5)
    time.sleep(0.5)
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
