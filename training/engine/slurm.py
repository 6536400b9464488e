"""What `srun` tells each of its tasks: its place among the tasks of the step, and where all of them can meet.

Only the environment is read, never the controller: a thousand tasks that ask it something at once are an attack on it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

Environment = Mapping[str, str]
THIS_HOST = "127.0.0.1"
# below the ports that Linux gives to outgoing connections (from 32768), above those of most services; a prime number
FIRST_PORT, NUM_PORTS = 20000, 12289


class Place(NamedTuple):
    """The place of a task in its step."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def is_srun_task(environment: Environment) -> bool:
    """Tell whether srun started this process as one of several; an allocation or a batch script alone has no step."""
    return "SLURM_STEP_NUM_TASKS" in environment and _number("SLURM_STEP_NUM_TASKS", environment) > 1


def read_place(environment: Environment) -> Place:
    """The place of this task; ValueError, naming the variable, if srun's variables are not whole."""
    node = _number("SLURM_NODEID", environment)
    tasks = tasks_per_node(_value("SLURM_STEP_TASKS_PER_NODE", environment))
    if node >= len(tasks):
        raise ValueError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes")
    return Place(
        rank=_number("SLURM_PROCID", environment),
        world_size=_number("SLURM_STEP_NUM_TASKS", environment),
        local_rank=_number("SLURM_LOCALID", environment),
        local_world_size=tasks[node],
    )


def tasks_per_node(text: str) -> list[int]:
    """The number of tasks on every node, of Slurm's way to write it: 2(x3),1 is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is '{text}'; srun writes it like 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_node(nodes: str) -> str:
    """The first name of Slurm's way to write a list of nodes: gpu[08-11,20],login is gpu08."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST is '{nodes}'; srun writes it like gpu[08-11,20]")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def meeting_address(environment: Environment) -> str:
    """Return an address of the node that rank 0 runs on.

    SLURM_LAUNCH_NODE_IPADDR is no such thing: from `salloc` on a login node it is the login node.

    Raises:
        ValueError: the name of that node has no address here.
    """
    if _number("SLURM_STEP_NUM_NODES", environment) == 1:
        return THIS_HOST
    nodes = _value("SLURM_STEP_NODELIST", environment)
    node = first_node(nodes)
    try:
        socket.getaddrinfo(node, None)
    except OSError as error:
        raise ValueError(
            f"{node}, the first node of {nodes}, has no address here ({error.strerror}); export MASTER_ADDR with one "
            f"that all nodes reach: NodeAddr of `scontrol show node {node}`"
        ) from None
    return node


def meeting_port(environment: Environment) -> int:
    """Choose a port for this job, step and attempt: others on the same node have another, as far as ports suffice."""
    job, step = _number("SLURM_JOB_ID", environment), _number("SLURM_STEP_ID", environment)
    attempt = int(environment.get("SLURM_RESTART_COUNT") or 0)
    return FIRST_PORT + (101 * job + 10 * step + attempt) % NUM_PORTS


def _value(name: str, environment: Environment) -> str:
    if not environment.get(name):
        raise ValueError(f"srun started this process, but {name} is not set; do not unset what srun sets")
    return environment[name]


def _number(name: str, environment: Environment) -> int:
    text = _value(name, environment)
    if not text.isdecimal():
        raise ValueError(f"{name} is '{text}'; srun sets it to a whole number")
    return int(text)
