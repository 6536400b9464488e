"""Worlds of forked ranks: a two-rank DeepSpeed cycle in seconds, with faults, and a report of how every rank ended.

with ForkServer(tmp_path) as server:
    world = server.run("module:function", {"run": "runs/a"}, world_size=2, faults=["kill@loop.step:rank=1"])
assert world.exit_codes == [76, -9]
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from faults import Fired, fired

SERVER = Path(__file__).with_name("fork_server.py")
PRELOADED = (
    "torch._dynamo",  # which the first optimiser imports
    "faults",
    "fault_worker",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which every engine imports, and it half of torch's compiler
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.module_inject.auto_ep_layer",
)
FAULT_LOG = "faults.jsonl"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class FaultNeverFired(AssertionError):
    """A test that injects a fault which nothing reaches would pass for nothing."""


@dataclass(frozen=True)
class EndedRank:
    """How one rank ended. exit_code: minus the signal's number if one ended it."""

    exit_code: int
    seconds: float
    was_killed: bool  # by the server, because the others had ended or the time was up
    stdout: str
    stderr: str
    result: Any  # what the target returned, None if it did not


@dataclass(frozen=True)
class EndedWorld:
    """How a world ended. left_behind: the command lines of processes that outlived their rank, which were killed."""

    ranks: list[EndedRank]
    fired: list[Fired]
    fault_log: Path
    timed_out: bool
    left_behind: list[str]

    @property
    def exit_codes(self) -> list[int]:
        return [rank.exit_code for rank in self.ranks]

    @property
    def results(self) -> list[Any]:
        return [rank.result for rank in self.ranks]

    @property
    def seconds(self) -> float:
        """Until the last rank ended."""
        return max(rank.seconds for rank in self.ranks)

    def explain(self) -> str:
        """What a failing test should show."""
        texts = [f"rank {number}: {rank}" for number, rank in enumerate(self.ranks)]
        return "\n".join([*texts, f"fired {self.fired}, timed out {self.timed_out}, left {self.left_behind}"])


class RunningWorld:
    """A world whose ranks are under way, so that a test can send them signals."""

    def __init__(self, server: ForkServer, folder: Path, faults: Sequence[str], pids: list[int]) -> None:
        self.folder = folder
        self.pids = pids
        self._server = server
        self._faults = faults

    def send(self, signal_number: int, *, rank: int) -> None:
        """Send a signal to one rank; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal_number)

    def wait(self, *, faults_may_miss: bool = False) -> EndedWorld:
        """See the world end. Raises FaultNeverFired unless every fault acted or may miss."""
        said = self._server.hear_end()
        ranks = [self._read(number, *ended) for number, ended in enumerate(said["ended"])]
        log = self.folder / FAULT_LOG
        world = EndedWorld(ranks, fired(log), log, said["timed_out"], said["left_behind"])
        missed = set(self._faults) - {line.fault for line in world.fired}
        if missed and not faults_may_miss:
            raise FaultNeverFired(f"{', '.join(sorted(missed))} never fired\n{world.explain()}")
        return world

    def _read(self, rank: int, exit_code: int, seconds: float, was_killed: bool) -> EndedRank:
        stdout, stderr = ((self.folder / f"rank{rank}.{name}").read_text() for name in ("stdout", "stderr"))
        result = self.folder / f"rank{rank}.json"
        value = json.loads(result.read_text()) if exit_code == 0 and result.exists() else None
        return EndedRank(exit_code, seconds, was_killed, stdout, stderr, value)


class ForkServer:
    """Starts worlds, one at a time, the first once everything is imported. Nothing of it outlives this process.

    folder: where each world leaves the output of its ranks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._running: RunningWorld | None = None
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), str(os.getpid()), *PRELOADED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ONE_THREAD | {"DS_ACCELERATOR": "cpu"},
            text=True,
        )
        self._is_ready = False

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; the kernel then ends ranks that still run."""
        self._server.kill()
        self._server.communicate()

    def run(
        self, target: str, arguments: Mapping[str, Any], *, faults_may_miss: bool = False, **options: Any
    ) -> EndedWorld:
        """`start` and `wait`."""
        return self.start(target, arguments, **options).wait(faults_may_miss=faults_may_miss)

    def start(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        world_size: int = 2,
        faults: Sequence[str] = (),
        timeout: float = 60.0,
        grace: float = 10.0,
        leftover_grace: float = 2.0,
        environment: Mapping[str, str] | None = None,
    ) -> RunningWorld:
        """Fork a world of which every rank calls `target`, a "module:function", with plain data as arguments.

        timeout: seconds until all ranks are killed. grace: seconds that the others have once one rank has ended.
        leftover_grace: seconds that processes which ranks have started may outlive them.
        """
        if not self._is_ready:
            self._is_ready = bool(self._hear())  # the first time on a machine DeepSpeed compiles its communication
        self._end_what_a_failed_test_left_running()
        folder = self._folder / f"world{next(self._numbers)}"
        folder.mkdir(parents=True)
        for rank, name in itertools.product(range(world_size), ("stdout", "stderr")):
            (folder / f"rank{rank}.{name}").touch()  # a rank may be killed before it has written anything
        order = {"target": target, "arguments": dict(arguments), "world_size": world_size, "faults": list(faults)}
        order |= {"timeout": timeout, "grace": grace, "leftover_grace": leftover_grace}
        order |= {"folder": str(folder), "fault_log": str(folder / FAULT_LOG), "environment": dict(environment or {})}
        print(json.dumps(order), file=self._server.stdin, flush=True)
        self._running = RunningWorld(self, folder, faults, self._hear()["pids"])
        return self._running

    def _end_what_a_failed_test_left_running(self) -> None:
        if self._running is not None:
            for rank in range(len(self._running.pids)):
                self._running.send(signal.SIGKILL, rank=rank)
            self.hear_end()

    def hear_end(self) -> dict[str, Any]:
        """The server's report on the world that runs, once that has ended."""
        said, self._running = self._hear(), None
        return said

    def _hear(self) -> dict[str, Any]:
        """The server's next answer. Raises RuntimeError if it has ended instead."""
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server has ended with code {self._server.wait()}; its stderr says why")
        return json.loads(line)
