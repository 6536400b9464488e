"""What is understood of the variables that srun sets. A real srun: test_slurm_cycle."""

from __future__ import annotations

import socket

import pytest

from training.engine.slurm import (
    FIRST_PORT,
    NUM_PORTS,
    first_node,
    is_srun_task,
    meeting_address,
    meeting_port,
    read_place,
    tasks_per_node,
)

# task 5 of 8, as `srun --nodes=3 --ntasks=8` places them
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NODELIST": "gpu[08-09,20]",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.99",
}


def resolve_nothing(host: str, port: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


def test_a_task_knows_its_place_on_its_own_node() -> None:
    assert read_place(STEP) == (5, 8, 2, 3)
    assert read_place(STEP | {"SLURM_NODEID": "2"}).local_world_size == 2


def test_only_tasks_of_a_step_of_several_count() -> None:
    assert is_srun_task(STEP)
    assert not is_srun_task({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # salloc, a batch script
    assert not is_srun_task(STEP | {"SLURM_STEP_NUM_TASKS": "1"})


@pytest.mark.parametrize(
    "text, counts", [("2", [2]), ("2(x2)", [2, 2]), ("2,1", [2, 1]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8])]
)
def test_tasks_per_node_are_read_as_slurm_writes_them(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[08-11,20],login", "gpu08"),
        ("gpu[20,08-11]", "gpu20"),
        ("a-1,b[2-3]", "a-1"),
        ("rack[3-4]n[07,09]-ib", "rack3n07-ib"),
    ],
)
def test_the_first_node_is_read_as_slurm_writes_lists(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    "change, words",
    [
        ({"SLURM_PROCID": ""}, "srun started this process, but SLURM_PROCID is not set"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(2)"}, r"SLURM_STEP_TASKS_PER_NODE is '2\(2\)'; srun writes it like"),
        ({"SLURM_NODEID": "3"}, "SLURM_NODEID is 3, but SLURM_STEP_TASKS_PER_NODE names 3 nodes"),
    ],
)
def test_variables_that_are_not_whole_are_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_place(STEP | change)


def test_ranks_meet_at_the_first_node_not_where_srun_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [host])
    assert meeting_address(STEP) == "gpu08"


def test_ranks_of_one_node_need_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolve_nothing)
    assert meeting_address(STEP | {"SLURM_STEP_NUM_NODES": "1"}) == "127.0.0.1"


def test_a_node_without_an_address_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolve_nothing)
    words = r"gpu08, the first node of gpu\[08-09,20\], has no address here .*MASTER_ADDR"
    with pytest.raises(ValueError, match=words):
        meeting_address(STEP)


def test_ports_differ_between_jobs_steps_and_attempts_but_not_between_ranks() -> None:
    neighbours = [
        STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": attempt}
        for job in range(1230, 1330)
        for step in "012"
        for attempt in ("", "1", "2")
    ]
    ports = {meeting_port(environment) for environment in neighbours}
    assert len(ports) == len(neighbours)
    assert min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + NUM_PORTS <= 32768
    assert meeting_port(STEP) == meeting_port(STEP | {"SLURM_PROCID": "7", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"})
