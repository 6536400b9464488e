"""The place of this process among the processes of a run, as the variables of its launcher give it.

Nothing here imports torch, so that a command can ask before it loads anything.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.engine import slurm


def place_of(environment: Mapping[str, str]) -> slurm.Place:
    """Read the variables of the deepspeed launcher and torchrun, else those of `srun`, else return a world of one.

    Raises:
        ValueError: the variables contradict one another; names them.
    """
    if environment.get("RANK"):
        return _place_by_launcher(environment)
    return slurm.read_place(environment) if slurm.is_srun_task(environment) else slurm.Place(0, 1, 0, 1)


def _place_by_launcher(environment: Mapping[str, str]) -> slurm.Place:
    """Read the place that the deepspeed launcher or torchrun gave; ValueError if none of them can have set it so."""
    place = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(value.isdecimal() for value in place.values()):
        said = ", ".join(f"{name}={value}" for name, value in place.items())
        raise ValueError(f"{said}: launchers set all three to numbers; unset RANK, or start with deepspeed or srun")
    rank, world_size, local_rank = map(int, place.values())
    if not rank < world_size:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size}: ranks count from 0; unset both, or correct them")
    if slurm.is_srun_task(environment) and world_size < int(environment["SLURM_STEP_NUM_TASKS"]):
        raise ValueError(  # each task would be a run of its own, and all would write to one folder
            f"RANK={rank} and WORLD_SIZE={world_size} are set, but srun started {environment['SLURM_STEP_NUM_TASKS']} "
            "tasks; unset RANK to let srun count, or start one task a node with a launcher in it"
        )
    local_world_size = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or str(world_size)
    if not local_world_size.isdecimal() or int(local_world_size) < 1:
        raise ValueError(f"LOCAL_WORLD_SIZE={local_world_size}: it is the number of ranks on this node; unset it")
    return slurm.Place(rank, world_size, local_rank, int(local_world_size))
