"""What a launcher's exit code means, and which exception ends with which; the numbers are those of sysexits.h.

code  meaning                                                          worth trying again?
0     done
1     an error of the program itself; its traceback is shown
64    the command line, a config, or a file it names is wrong          no
65    data or a checkpoint is damaged, or too many samples are         no
69    a service that is needed is absent: tracker, server of shards    yes
70    training diverged                                                with other settings
71    a process that reads data failed                                 yes
73    there is no room, or no right, to write                          after making some
74    checkpoints cannot be written: several in a row, or the last     after making room
75    stopped as asked, everything saved                               yes: the same command goes on
76    no progress, or another rank is lost                             yes, if the rank that ended first agrees
130, 138, 143   ended at once, by a second SIGINT, SIGUSR1 or SIGTERM  yes, from the checkpoint before
"""

from __future__ import annotations

import errno
import re
import traceback
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist

from data_pipeline.files.damage import DamagedData
from data_pipeline.loading.read_ahead import WorkerFailed
from data_pipeline.remote.remote import RemoteError
from launchers.setup.config_files import one_line
from training.checkpoints.checkpoint import CheckpointsFailing
from training.checkpoints.commit import DamagedCheckpoint
from training.supervision.bad_samples import TooManyBadSamples
from training.supervision.divergence import TrainingDiverged
from training.supervision.stopping import Stopped
from training.supervision.watch import EXIT_NO_PROGRESS
from training.tracking.mlflow import TrackerUnavailable

EXIT_ERROR = 1
EXIT_BAD_INPUT = 64
EXIT_CANNOT_CREATE = 73
EXIT_INTERRUPTED = 130
CODES: MappingProxyType[type[BaseException], int] = MappingProxyType(  # the first that fits
    {
        Stopped: 75,
        DamagedCheckpoint: 65,
        DamagedData: 65,
        TooManyBadSamples: 65,
        TrackerUnavailable: 69,
        RemoteError: 69,
        TrainingDiverged: 70,
        WorkerFailed: 71,
        CheckpointsFailing: 74,
        ValueError: EXIT_BAD_INPUT,
        OSError: EXIT_BAD_INPUT,
        KeyboardInterrupt: EXIT_INTERRUPTED,
    }
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# how gloo and NCCL speak of another process: closed, reset, or silent for too long
LOST_PEERS = re.compile(
    r"gloo/transport/|connection (closed|reset) by peer|timed out waiting|socket timeout"
    r"|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL communicator was aborted",
    re.IGNORECASE,
)
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
OUR_PACKAGES = ("launchers", "training", "data_pipeline", "models")


def exit_code(error: BaseException) -> int:
    """The code to end with; EXIT_ERROR for what only a mistake in the program explains."""
    if lost_its_peers(error):
        return EXIT_NO_PROGRESS
    if _port_is_taken(error):
        return EXIT_BAD_INPUT
    if type(error) in (OSError, PermissionError) and error.errno in NO_ROOM:
        return EXIT_CANNOT_CREATE
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), EXIT_ERROR)


def lost_its_peers(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return not _port_is_taken(error)
    return isinstance(error, RuntimeError) and LOST_PEERS.search(str(error)) is not None


def _port_is_taken(error: BaseException) -> bool:
    return isinstance(error, dist.DistNetworkError) and PORT_TAKEN.search(str(error)) is not None


def describe(error: BaseException) -> str:
    """What there is to say, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if _port_is_taken(error):
        return "MASTER_PORT is in use, perhaps by another run; start with another, as deepspeed --master_port 29501"
    if not lost_its_peers(error):
        return one_line(error)
    said = " ".join(str(error).split()).removesuffix(" GLHF! 🏖️")
    how = "waited in vain for another rank" if "timed out" in said.lower() else "lost another rank"
    return f"{how} in {_place(error)}; see its own message. ({said[:160]})"


def _place(error: BaseException) -> str:
    """The innermost function of ours that the error has passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    return f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "a collective"


def _is_ours(file: str) -> bool:
    root = Path(__file__).resolve().parents[2]
    return any(Path(file).is_relative_to(root / package) for package in OUR_PACKAGES)
