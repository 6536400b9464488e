"""The process that forks ranks: it imports torch, DeepSpeed and our packages once, so that a rank starts in no time.

Started by `fork_world.ForkServer` as a process of its own, because a process with threads must not be forked. It reads
one order per line on stdin and answers with two lines of JSON: the process ids of the world, and how each rank ended.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

SUPPORT = Path(__file__).resolve().parent
SHARED_MEMORY = Path("/dev/shm")  # where DeepSpeed leaves 66 MB of each CPU rank when it ends, and more when killed
POLL_SECONDS = 0.005
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Rank:
    """A forked rank, until it has ended."""

    pid: int
    started: float = field(default_factory=time.monotonic)
    exit_code: int | None = None  # minus the signal's number if one ended it
    seconds: float = 0.0
    was_killed: bool = False  # by us, after the grace or the timeout


def set_process_control(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent ends."""
    set_process_control(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def preload(modules: list[str]) -> None:
    """Import what ranks need, and load DeepSpeed's compiled communication, which alone takes seconds."""
    from training.engine.engine import _import_deepspeed

    _import_deepspeed()
    for name in modules:
        importlib.import_module(name)
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
    gc.freeze()  # so that DeepSpeed's full collections do not walk, and copy, all that was imported
    if threading.active_count() > 1:
        raise RuntimeError(f"threads run before the first fork: {threading.enumerate()}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_rank(order: dict[str, Any], rank: int, port: int) -> Rank:
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            die_with(server)
            _become_rank(order, rank, port)
            code = _exit_code(lambda: _call_target(order, rank))
        except BaseException:  # whatever happens, a forked rank must not go on as a second server
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return Rank(pid)


def _become_rank(order: dict[str, Any], rank: int, port: int) -> None:
    """Environment, folder, output files and faults of one rank."""
    from faults import install, watch_disk

    folder, world_size = Path(order["folder"]), str(order["world_size"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    os.environ |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= order["environment"]
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # instead of the orders
    _answers.close()
    install(order["faults"], rank=rank, log=Path(order["fault_log"]))
    watch_disk()


def _call_target(order: dict[str, Any], rank: int) -> None:
    module, _, function = order["target"].partition(":")
    result = getattr(importlib.import_module(module), function)(**order["arguments"])
    (Path(order["folder"]) / f"rank{rank}.json").write_text(json.dumps(result))


def _exit_code(call: Callable[[], None]) -> int:
    """Call, and end as a Python program would: 1 and a traceback for an exception, or what SystemExit says."""
    try:
        call()
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
            return 1
        return left.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_world(order: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of one world, see it end, and leave nothing behind."""
    port = free_port()
    ranks = [fork_rank(order, rank, port) for rank in range(order["world_size"])]
    answer({"pids": [rank.pid for rank in ranks]})
    timed_out = _wait(ranks, timeout=order["timeout"], grace=order["grace"])
    left_behind = _end_descendants(order["leftover_grace"])
    for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink()
    ended = [[rank.exit_code, rank.seconds, rank.was_killed] for rank in ranks]
    return {"ended": ended, "timed_out": timed_out, "left_behind": left_behind}


def _wait(ranks: list[Rank], *, timeout: float, grace: float) -> bool:
    """Wait for all ranks; kill those left after `timeout` seconds, or `grace` seconds after the first one's end."""
    start = time.monotonic()
    first_end, timed_out = None, False
    while any(rank.exit_code is None for rank in ranks):
        _reap(ranks)
        now = time.monotonic()
        if first_end is None and any(rank.exit_code is not None for rank in ranks):
            first_end = now
        timed_out = timed_out or now - start > timeout
        if timed_out or (first_end is not None and now - first_end > grace):
            _kill([rank for rank in ranks if rank.exit_code is None])
        time.sleep(POLL_SECONDS)
    return timed_out


def _reap(ranks: list[Rank]) -> None:
    for rank in ranks:
        if rank.exit_code is None and (ended := os.waitpid(rank.pid, os.WNOHANG))[0]:
            rank.exit_code = os.waitstatus_to_exitcode(ended[1])
            rank.seconds = time.monotonic() - rank.started


def _kill(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.was_killed = True
        os.kill(rank.pid, signal.SIGKILL)


def _end_descendants(grace: float) -> list[str]:
    """Kill what ranks have started and left running after `grace` seconds; their command lines."""
    deadline = time.monotonic() + grace
    while (left := _children()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    lines = [_command_line(pid) for pid in left]
    while left := _children():  # a killed child's own children come to us in turn
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return lines


def _children() -> list[int]:
    """The processes whose parent we are, the dead ones reaped; what a rank orphans becomes ours: we are a subreaper."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
        pid = int(stat.parent.name)
        if int(parent) == os.getpid() and os.waitpid(pid, os.WNOHANG)[0] == 0:
            found.append(pid)
    return found


def _command_line(pid: int) -> str:
    return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), file=_answers, flush=True)


def main() -> NoReturn:
    """Take orders until stdin ends."""
    die_with(int(sys.argv[1]))
    set_process_control(PR_SET_CHILD_SUBREAPER, 1)
    sys.path[:0] = [str(SUPPORT.parents[1]), str(SUPPORT)]
    preload(sys.argv[2:])
    answer({"ready": os.getpid()})
    for line in sys.stdin:
        answer(run_world(json.loads(line)))
    os._exit(0)


if __name__ == "__main__":
    # what imports print must not be taken for an answer, nor must a rank's output
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
