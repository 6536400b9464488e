"""Who a process is, from the environment that each launcher leaves. Worlds of several ranks: test_distributed.

A real srun: tests/launchers/slurm/test_slurm_cycle.
"""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from training.engine import distributed
from training.engine.distributed import World, agree_on_error, barrier, join_world, sum_over_ranks
from training.engine.slurm import FIRST_PORT, NUM_PORTS, first_node, meeting_port, read_place

# task 5 of 8, as `srun --nodes=3 --ntasks=8` places them
SRUN = {
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
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}  # no step, so no other process
OTHERS = ("MASTER_ADDR", "MASTER_PORT", "SLURM_CPUS_PER_TASK", "DS_ACCELERATOR")
ALONE, FIFTH = (0, 1, 0, 1), (5, 8, 1, 4)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        pytest.param({}, ALONE, id="no launcher"),
        pytest.param(TORCHRUN, FIFTH, id="torchrun"),
        pytest.param(DEEPSPEED, FIFTH, id="deepspeed"),
        pytest.param(SRUN, (5, 8, 2, 3), id="srun"),
        pytest.param(SRUN | {"SLURM_NODEID": "2"}, (5, 8, 2, 2), id="srun, a node with fewer tasks"),
        pytest.param(SRUN | TORCHRUN, FIFTH, id="torchrun under srun"),
        pytest.param(SALLOC | {"SLURM_PROCID": "0"}, ALONE, id="salloc or a batch script"),
        pytest.param(SALLOC | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE, id="srun of one task"),
    ],
)
def test_a_process_knows_its_place_under_every_launcher(
    environment: dict[str, str], place: tuple[int, int, int, int]
) -> None:
    world = World.from_environment(environment)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == place
    assert world.is_rank_zero == (place[0] == 0)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        # exported in the shell that submitted the job: tasks of srun would each think they are alone
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "but srun started 8 tasks; unset RANK"),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=, LOCAL_RANK=: launchers set all three"),
        (SRUN | {"SLURM_PROCID": ""}, "SLURM_PROCID is not set"),
        (SRUN | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(2)"}, r"SLURM_STEP_TASKS_PER_NODE is '2\(2\)'; srun writes it like"),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID is 3, but SLURM_STEP_TASKS_PER_NODE names 3 nodes"),
    ],
)
def test_half_of_what_a_launcher_sets_is_refused_by_name(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        World.from_environment(environment)


@pytest.mark.parametrize(
    ("text", "sizes"), [("2", [2]), ("2(x2)", [2, 2]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8])]
)
def test_tasks_per_node_are_read_as_slurm_writes_them(text: str, sizes: list[int]) -> None:
    nodes = [SRUN | {"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": str(node)} for node in range(len(sizes))]
    assert [read_place(node).local_world_size for node in nodes] == sizes


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("gpu[08-11,20],login", "gpu08"),
        ("gpu[20,08-11]", "gpu20"),
        ("a-1,b[2-3]", "a-1"),
        ("rack[3-4]n[07,09]-ib", "rack3n07-ib"),
    ],
)
def test_the_first_node_is_read_as_slurm_writes_lists(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_ports_differ_between_jobs_steps_and_attempts_but_not_between_ranks() -> None:
    neighbours = [
        SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": attempt}
        for job in range(1230, 1330)
        for step in "012"
        for attempt in ("", "1", "2")
    ]
    ports = {meeting_port(environment) for environment in neighbours}
    assert len(ports) == len(neighbours)
    assert min(ports) >= FIRST_PORT and max(ports) < FIRST_PORT + NUM_PORTS <= 32768
    assert meeting_port(SRUN) == meeting_port(SRUN | {"SLURM_PROCID": "7", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"})


class Joining:
    """Calls join_world without the joining; keeps what it would have asked torch for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.groups: list[dict[str, Any]] = []
        self.threads: list[int] = []
        for name in (*TORCHRUN, *DEEPSPEED, *SRUN, *OTHERS):
            patch.setenv(name, "")  # so that what join_world exports is taken back
            patch.delenv(name)
        patch.setattr("training.engine.distributed.torch.set_num_threads", self.threads.append)
        patch.setattr(dist, "init_process_group", lambda backend, **options: self.groups.append(options))
        patch.setattr(socket, "getaddrinfo", lambda host, port: [host])

    def join(self, environment: dict[str, str]) -> World:
        for name, value in environment.items():
            self.patch.setenv(name, value)
        return join_world(timeout_seconds=5)


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Joining:
    return Joining(monkeypatch)


def resolve_nothing(host: str, port: object) -> None:
    raise socket.gaierror(-2, "Name or service not known")


def test_a_lone_process_gets_a_group_of_one(joining: Joining) -> None:
    assert joining.join({}).world_size == 1
    assert joining.groups == [{"rank": 0, "world_size": 1, "timeout": timedelta(seconds=5)}]
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")


def test_processes_that_cannot_find_each_other_are_told_what_is_missing(joining: Joining) -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT not set, but this is rank 5 of 8"):
        joining.join(TORCHRUN)
    with pytest.raises(ValueError, match="^MASTER_PORT not set"):
        joining.join({"MASTER_ADDR": "gpu1"})
    assert not joining.groups


@pytest.mark.parametrize(
    ("given", "address", "port"),
    [
        ({}, "gpu08", str(meeting_port(SRUN))),  # the first node, not where srun was typed
        ({"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}, "127.0.0.1", None),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, "10.0.0.1", "29500"),
    ],
)
def test_tasks_of_srun_meet_without_help_unless_the_user_says_where(
    joining: Joining, given: dict[str, str], address: str, port: str | None
) -> None:
    assert joining.join(SRUN | given | {"SLURM_CPUS_PER_TASK": "6"}).rank == joining.groups[0]["rank"] == 5
    assert joining.threads == [6]  # cores that srun gave to a task are not shared again
    assert os.environ["MASTER_ADDR"] == address and os.environ["MASTER_PORT"] == (port or os.environ["MASTER_PORT"])


def test_a_node_without_an_address_is_said_with_what_to_do(joining: Joining) -> None:
    joining.patch.setattr(socket, "getaddrinfo", resolve_nothing)
    with pytest.raises(ValueError, match=r"gpu08, the first node of gpu\[08-09,20\], has no address .*MASTER_ADDR"):
        joining.join(SRUN)


def test_a_task_that_is_shown_one_gpu_uses_that_one(joining: Joining) -> None:
    """DeepSpeed takes LOCAL_RANK for the number of the GPU, whatever the place of the task on its node."""
    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        joining.patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    world = joining.join(SRUN)
    assert (world.local_rank, world.device, os.environ["LOCAL_RANK"]) == (2, torch.device("cuda", 0), "0")
    assert World.from_environment({"DS_ACCELERATOR": "cpu"}).device == torch.device("cpu")


def test_a_world_of_one_needs_no_group_and_raises_an_error_as_it_is() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(sum_over_ranks(values, World()), values)
    barrier(World())
    agree_on_error(None, World())
    with pytest.raises(FileNotFoundError, match="gone"):
        agree_on_error(FileNotFoundError("gone"), World())


def test_one_process_meets_nobody_whatever_a_template_has_exported(joining: Joining) -> None:
    joining.join({"MASTER_ADDR": "login.cluster.example", "MASTER_PORT": "29500"})
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "0")


def test_too_little_shared_memory_is_said_before_ranks_die_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 * 2**20, used=0, free=64 * 2**20)  # what a container has by default
    monkeypatch.setattr(distributed.shutil, "disk_usage", lambda folder: usage)
    distributed.refuse_small_shared_memory(1)
    with pytest.raises(OSError, match="67 MB are free, 2 ranks on a CPU need 138; .*--shm-size=1g") as refused:
        distributed.refuse_small_shared_memory(2)
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, "/dev/shm")
    usage.free = 2**30
    distributed.refuse_small_shared_memory(8)
