"""A real Slurm of emulated nodes on this host: munge, controller and node daemons in a folder of their own.

Needs root and Debian's packages `slurm-wlm` and `munge`; no systemd, no settings outside the folder. By hand:
`python tests/support/slurm_cluster.py` says what to export, and stops the cluster on Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from unittest import mock

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
START_SECONDS = 30.0
SETTINGS = """
ClusterName=test
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
MinJobAge=3600
"""


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install --no-install-recommends slurm-wlm munge"
    return "" if os.getuid() == 0 else "Slurm's daemons need root"


class SlurmCluster:
    """Use as a context: on entry the nodes are idle, on exit no process of the cluster is left."""

    def __init__(self, folder: Path, *, num_nodes: int = 2) -> None:
        self.folder = folder
        self.num_nodes = num_nodes
        self.daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What sbatch and the others need to find this cluster and no other."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for job in self.ask("squeue", "--noheader", "--format=%i").split():
            self.ask("scancel", job)
        wait_until(lambda: not self.ask("squeue", "--noheader"), "the jobs end", seconds=60)
        self._stop()

    def ask(self, *command: str, folder: Path | None = None, seconds: float = 60) -> str:
        """Run a command of Slurm's and return what it prints; RuntimeError with its own words if it fails."""
        done = subprocess.run(
            command, env=self.environment, cwd=folder, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, `JobState` and `Restarts` among it."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._configuration())
        paths = {"key-file": key, "socket": self.folder / "munge.socket"}
        paths |= {name: self.folder / f"munge.{name}" for name in ("pid-file", "log-file", "seed-file")}
        self._launch("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
        wait_until(paths["socket"].exists, "munged listens", seconds=START_SECONDS)
        self._launch("slurmctld", "-D", "-c")
        for node in range(1, self.num_nodes + 1):
            self._launch("slurmd", "-D", "-N", f"node{node}")
        wait_until(self._is_ready, f"{self.num_nodes} nodes are idle", seconds=START_SECONDS)

    def _is_ready(self) -> bool:
        try:
            return self.ask("sinfo", "--noheader", "--states=idle", "--format=%D") == str(self.num_nodes)
        except RuntimeError:  # the controller does not answer yet
            return False

    def _configuration(self) -> str:
        host, ports = socket.gethostname(), free_ports(self.num_nodes + 1)
        places = {
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "AuthInfo": f"socket={self.folder}/munge.socket",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
        }
        nodes = [
            f"NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
            for number, port in enumerate(ports[1:], start=1)
        ]
        partition = f"PartitionName=debug Nodes=node[1-{self.num_nodes}] Default=YES MaxTime=INFINITE State=UP"
        return "\n".join([*(f"{name}={value}" for name, value in places.items()), SETTINGS, *nodes, partition, ""])

    def _launch(self, *command: str) -> None:
        with (self.folder / f"daemon-{len(self.daemons)}-{command[0]}.log").open("wb") as log:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.daemons.append(daemon)

    def _stop(self) -> None:
        for daemon in reversed(self.daemons):  # munged last: the others still sign their farewell with it
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster whose jobs run this Python, by the path that it has here: under another, DeepSpeed compiles anew."""
    version = f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or f"{Path.home()}/.cache/torch_extensions/{version}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with mock.patch.dict(os.environ, TORCH_EXTENSIONS_DIR=extensions, PATH=path), SlurmCluster(folder) as cluster:
        yield cluster


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(holds: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Poll until something holds; TimeoutError if it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s until {what}")
        time.sleep(0.2)


def main() -> None:
    if reason := why_not():
        sys.exit(f"error: {reason}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder)) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
