"""Who a process is, from the environment that each launcher leaves. Worlds of several ranks: test_distributed."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from training.distributed import World, agree_on_error, barrier, join_world, sum_over_ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    environment = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
    assert place(environment) == (5, 8, 1, 4)


def test_a_launcher_under_srun_wins_over_srun() -> None:
    # one srun task per node starts torchrun, whose children inherit SLURM's variables
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert place(slurm | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) == (5, 8, 1, 4)


def test_an_interactive_allocation_is_a_world_of_one() -> None:
    assert place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}) == (0, 1, 0, 1)  # salloc: no step, so no other process
    assert place({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}) == (0, 1, 0, 1)


def test_processes_that_cannot_find_each_other_are_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR is not set, but this is rank 1 of 2"):
        join_world()
    assert not dist.is_initialized()


def test_a_lone_process_gets_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what join_world exports
        monkeypatch.delenv(name)
    monkeypatch.setattr("training.distributed.torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: groups.append(options))
    groups: list[dict[str, object]] = []
    assert join_world().world_size == 1
    assert (groups[0]["rank"], groups[0]["world_size"]) == (0, 1)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")


def test_collectives_of_a_world_of_one_need_no_group() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(sum_over_ranks(values, World()), values)
    barrier(World())
    agree_on_error(None, World())


def test_an_error_in_a_world_of_one_is_raised_as_it_is() -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        agree_on_error(FileNotFoundError("gone"), World())
