"""Who a process is, from the environment that each launcher leaves. Worlds of several ranks: test_distributed."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from training.engine.distributed import World, agree_on_error, barrier, join_world, sum_over_ranks
from training.engine.slurm import meeting_port

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}


@dataclass
class Joined:
    groups: list[dict[str, object]]
    threads: list[int]


def place(environment: dict[str, str]) -> tuple[int, int, int, int]:
    world = World.from_environment(environment)
    return world.rank, world.world_size, world.local_rank, world.local_world_size


def test_without_a_launcher_the_world_is_this_process() -> None:
    assert place({}) == (0, 1, 0, 1)
    assert World.from_environment({}).is_rank_zero


def test_torchrun_says_everything() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place(environment) == (5, 8, 1, 4)
    assert not World.from_environment(environment).is_rank_zero


def test_deepspeed_calls_the_local_size_otherwise() -> None:
    assert place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}) == (5, 8, 1, 4)


def test_srun_is_read_where_no_launcher_spoke() -> None:
    assert place(SRUN) == (5, 8, 1, 4)


def test_a_launcher_under_srun_wins_over_srun() -> None:
    # one srun task per node starts torchrun, whose children inherit SLURM's variables
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert place(slurm | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == (5, 8, 1, 4)


def test_an_interactive_allocation_is_a_world_of_one() -> None:
    assert place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}) == (0, 1, 0, 1)  # salloc: no step, so no other process
    assert place({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}) == (0, 1, 0, 1)


def test_tasks_of_srun_do_not_each_think_they_are_alone() -> None:
    left_behind = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # exported in the shell that submitted the job
    with pytest.raises(ValueError, match="RANK=0 and WORLD_SIZE=1 are set, but srun started 8 tasks; unset RANK"):
        place(SRUN | left_behind)


def test_half_of_what_a_launcher_sets_is_refused() -> None:
    with pytest.raises(ValueError, match="RANK=1, WORLD_SIZE=, LOCAL_RANK=: launchers set all three"):
        place({"RANK": "1"})


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    """join_world without the joining: what it would have asked torch for."""
    for name in (*NAMES, *SRUN, "SLURM_CPUS_PER_TASK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what join_world exports
        monkeypatch.delenv(name)
    joined = Joined([], [])
    monkeypatch.setattr("training.engine.distributed.torch.set_num_threads", joined.threads.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.groups.append(options))
    return joined


def test_processes_that_cannot_find_each_other_are_told_what_is_missing(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT not set, but this is rank 1 of 2"):
        join_world()
    monkeypatch.setenv("MASTER_ADDR", "gpu1")
    with pytest.raises(ValueError, match="^MASTER_PORT not set"):
        join_world()
    assert not joined.groups


def test_a_lone_process_gets_a_group_of_one(joined: Joined) -> None:
    assert join_world(timeout_seconds=5).world_size == 1
    assert joined.groups == [{"rank": 0, "world_size": 1, "timeout": timedelta(seconds=5)}]
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")


def test_tasks_of_srun_meet_without_help(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [host])
    assert join_world().rank == joined.groups[0]["rank"] == 5
    assert os.environ["MASTER_ADDR"] == "gpu1"
    assert os.environ["MASTER_PORT"] == str(meeting_port(SRUN))


def test_a_task_that_is_shown_one_gpu_uses_that_one(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its place on the node; DeepSpeed takes LOCAL_RANK for the number of the GPU."""
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [host])
    world = join_world()
    assert (world.local_rank, world.device, os.environ["LOCAL_RANK"]) == (1, torch.device("cuda", 0), "0")


def test_deepspeed_and_we_agree_to_use_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert World.from_environment({"DS_ACCELERATOR": "cpu"}).device == torch.device("cpu")
    assert World.from_environment({}).device == torch.device("cuda", 0)


def test_an_address_and_a_port_that_the_user_has_set_stay(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    join_world()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_cores_that_srun_gave_to_a_task_are_not_shared_again(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | {"MASTER_ADDR": "gpu1", "SLURM_CPUS_PER_TASK": "6"}).items():
        monkeypatch.setenv(name, value)
    join_world()
    assert joined.threads == [6]


def test_collectives_of_a_world_of_one_need_no_group() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(sum_over_ranks(values, World()), values)
    barrier(World())
    agree_on_error(None, World())


def test_an_error_in_a_world_of_one_is_raised_as_it_is() -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        agree_on_error(FileNotFoundError("gone"), World())
