"""Who this process is among the processes of a run, and the few collectives that the loops need.

Everything else in `training` takes a `World` as an argument; nothing looks at the environment again. A single process
is the same code with `world_size` 1. Collectives go through torch.distributed, which DeepSpeed's engine shares.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.files.claim import claimed_folder
from training.engine import slurm
from training.engine.host_memory import keep_freed_memory
from training.engine.place import place_of

SHARED_BYTES = 66 * 2**20  # of shared memory that DeepSpeed takes for each rank on a CPU


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
        place = place_of(environment)
        return cls(*place, _device(place.local_rank, environment))


def _device(local_rank: int, environment: Mapping[str, str]) -> torch.device:
    if not torch.cuda.is_available() or environment.get("DS_ACCELERATOR") == "cpu":  # to which DeepSpeed listens
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each process one GPU only


def join_world(world: World | None = None, *, timeout_seconds: float = 600.0) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and share the cores of the node fairly; returns the world.

    world: the place of this process, by default that of `World.from_environment`. timeout_seconds: after which a
    collective that not all ranks have entered is an error.

    Raises:
        ValueError: the processes could not find each other: no address or port to meet at is known.
    """
    world = world or World.from_environment()
    by_srun = not os.environ.get("RANK") and slurm.is_srun_task(os.environ)
    _export_for_deepspeed(world)
    _export_meeting_point(world, by_srun)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(_share_of_cores(world, by_srun))
        keep_freed_memory()
        if world.local_rank == 0:
            refuse_small_shared_memory(world.local_world_size)
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(backend, rank=world.rank, world_size=world.world_size, timeout=timeout)
    return world


def refuse_small_shared_memory(ranks: int, folder: str = "/dev/shm") -> None:
    """Check that the ranks of this host, on its CPU, find room for the buffers through which DeepSpeed adds up.

    Without it they die by SIGBUS or SIGSEGV in the first collective, without a word. Containers have 64 MB by default.

    Raises:
        OSError: there is too little room; the line says how to get more.
    """
    needed = ranks * SHARED_BYTES if ranks > 1 else 0
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else needed
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{free / 1e6:.0f} MB are free, {ranks} ranks on a CPU need {needed / 1e6:.0f}; start the container with "
            f"--shm-size=1g, remove {folder}/deepspeed_allreduce_buffer_* of runs that have ended, or use one process",
            folder,
        )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `device`. A GPU copies it by itself, from pinned memory, and nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _export_meeting_point(world: World, by_srun: bool) -> None:
    """Set MASTER_ADDR and MASTER_PORT, where rank 0 listens, unless they are set already.

    A single process meets nobody: an address that a job's template has exported must not keep it waiting.
    """
    if world.world_size == 1:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.THIS_HOST, "0"
        return
    if by_srun:
        address = os.environ.get("MASTER_ADDR") or slurm.meeting_address(os.environ)
        port = slurm.meeting_port(os.environ)
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ValueError(
            f"{' and '.join(missing)} not set, but this is rank {world.rank} of {world.world_size}; start with "
            "`deepspeed`, `torchrun` or `srun`, or export MASTER_ADDR and MASTER_PORT of the first node"
        )
    else:
        return
    os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or address
    os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(port)


def _share_of_cores(world: World, by_srun: bool) -> int:
    """The number of this process's own cores; srun may have bound it to them or not, but says how many they are."""
    if by_srun and os.environ.get("SLURM_CPUS_PER_TASK"):
        return int(os.environ["SLURM_CPUS_PER_TASK"])
    return max(1, len(os.sched_getaffinity(0)) // world.local_world_size)


def _export_for_deepspeed(world: World) -> None:
    """DeepSpeed reads these names only, whichever launcher started us; without a GPU it must be told to use the CPU."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.world_size)
    on_cpu = world.device.type == "cpu"
    os.environ["LOCAL_RANK"] = str(world.local_rank if on_cpu else world.device.index)  # which it takes for the GPU's
    os.environ.setdefault("LOCAL_SIZE", str(world.local_world_size))
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    if world.world_size > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The sum of `values` over all ranks, on every rank; any shape, the same on all ranks."""
    if world.world_size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return what every rank passed as `value`, plain data, in the order of ranks."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


class RankFailure(ValueError):
    """An error of one or several ranks, raised on all of them; where it came from is kept of the first one's.

    errno: the number of an OSError. exit_code: of an error that carries one.
    """

    errno: int | None = None

    def __init__(self, text: str, errno: int | None, exit_code: int | None) -> None:
        super().__init__(text)
        self.errno = errno
        if exit_code is not None:
            self.exit_code = exit_code


def agree_on_error(error: Exception | None, world: World) -> None:
    """Turn an error on any rank into the same one-line error on all, so that nobody waits for a rank that has left.

    Raises:
        RankFailure: naming the ranks and what they said.
    """
    if world.world_size == 1:
        if error is not None:
            raise error
        return
    origin = (str(error), getattr(error, "errno", None), getattr(error, "exit_code", None))
    said = gather_objects(None if error is None else origin, world)
    failures = {rank: told for rank, told in enumerate(said) if told is not None}
    if failures:
        texts = sorted({text for text, _, _ in failures.values()})
        _, errno, exit_code = next(iter(failures.values()))
        raise RankFailure(f"rank {', '.join(map(str, failures))}: {'; '.join(texts)}", errno, exit_code)


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Run a block that may fail on some ranks, and let its OSError or ValueError end all of them: a collective."""
    problem: Exception | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        problem = error
    agree_on_error(problem, world)


@contextmanager
def owned_by_rank_zero(folder: Path, world: World) -> Iterator[None]:
    """Own the folder that all ranks write, for as long as the block runs. A collective.

    Raises:
        Claimed, RankFailure: another command owns it.
    """
    with ExitStack() as stack:
        with failing_together(world):
            if world.is_rank_zero:
                stack.enter_context(claimed_folder(folder))
        yield


def agree_on_value(value: Any, what: str, world: World) -> None:
    """Raise ValueError on all ranks if they do not all have the same `value`: most often their disks are not shared."""
    values = gather_objects(value, world)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(
                f"rank 0 and rank {rank} do not see the same in {what}: {values[0]} and {other}; "
                "the run folder must be on storage that all nodes share"
            )
