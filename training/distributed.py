"""Who this process is among the processes of a run, and the few collectives that the loops need.

Everything else in `training` takes a `World` as an argument; nothing looks at the environment again. A single process
is the same code with `world_size` 1. Collectives go through torch.distributed, which DeepSpeed's engine shares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The place of this process: `rank` of `world_size`, `local_rank` of `local_world_size` on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read the variables of the deepspeed launcher and torchrun, else those of `srun`, else a world of one."""
        if "RANK" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        else:
            return cls(device=_device(0))
        rank, world_size, local_rank = (int(environment[name]) for name in names[:3])
        local_world_size = int(environment.get(names[3]) or environment.get("LOCAL_SIZE") or world_size)
        return cls(rank, world_size, local_rank, local_world_size, _device(local_rank))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each process one GPU only


def join_world(timeout_minutes: float = 10.0) -> World:
    """Find this process's place, join the process group (NCCL on GPUs, gloo on CPUs) and share the cores fairly.

    Raises:
        ValueError: `WORLD_SIZE` is above 1 but `MASTER_ADDR` is not set, so the processes could not find each other.
    """
    world = World.from_environment()
    if world.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    elif "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"MASTER_ADDR is not set, but this is rank {world.rank} of {world.world_size}; start with `deepspeed` or "
            "`torchrun`, or export MASTER_ADDR and MASTER_PORT of the first node"
        )
    _export_for_deepspeed(world)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_world_size))
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, rank=world.rank, world_size=world.world_size, timeout=timedelta(minutes=timeout_minutes)
        )
    return world


def _export_for_deepspeed(world: World) -> None:
    """DeepSpeed reads these names only, whichever launcher started us; without a GPU it must be told to use the CPU."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.world_size)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    os.environ.setdefault("LOCAL_SIZE", str(world.local_world_size))
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(exit_code: int) -> NoReturn:
    """End this rank at once, its output written.

    An ordinary exit takes the interpreter down while gloo's threads may still want it, and now and then such a rank is
    aborted (SIGABRT) after its work is done and saved.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def barrier(world: World) -> None:
    if world.world_size > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The sum of `values` over all ranks, on every rank; any shape, the same on all ranks."""
    if world.world_size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def agree_on_error(error: Exception | None, world: World) -> None:
    """Turn an error on any rank into the same one-line error on all, so that nobody waits for a rank that has left.

    Raises:
        ValueError: naming the ranks and what they said.
    """
    if world.world_size == 1:
        if error is not None:
            raise error
        return
    said: list[str | None] = [None] * world.world_size
    dist.all_gather_object(said, None if error is None else str(error))
    failures = {rank: text for rank, text in enumerate(said) if text is not None}
    if failures:
        texts = sorted(set(failures.values()))
        raise ValueError(f"rank {', '.join(map(str, failures))}: {'; '.join(texts)}")


def agree_on_value(value: Any, what: str, world: World) -> None:
    """Raise ValueError on all ranks if they do not all have the same `value`: most often their disks are not shared."""
    if world.world_size == 1:
        return
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"rank 0 and rank {rank} do not see the same in {what}: {values[0]} and {other}; "
                "the run folder must be on storage that all nodes share"
            )
