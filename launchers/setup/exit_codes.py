"""What a command's exit code means, and which one an exception ends it with. The numbers follow sysexits.h.

code  meaning                                                          worth trying again?
0     done
1     an error of the program itself; its traceback is shown. Or a
      rank hung while C code held the interpreter
64    the command line, a config, or a file it names is wrong          no
65    data or a checkpoint is damaged, or too many samples are         no
69    a service that is needed is absent: tracker, server of shards    yes
70    training diverged                                                with other settings
71    a process that reads data failed                                 yes
73    there is no room, or no right, to write; or another command      after making some, or
      writes this folder                                               when it has ended
74    storage or a connection failed in the middle of the work, or     yes, once it is well
      checkpoints could not be written: several in a row, or the last
75    stopped as asked, everything saved                               yes: the same command goes on
76    no progress, or another rank is lost                             yes, if the rank that ended first agrees
130, 138, 143, 129   ended at once, by a second SIGINT, SIGUSR1,     yes, from the checkpoint before
                     SIGTERM or SIGHUP

An exception that ends a command carries its number as `exit_code`, so this module imports none of ours, and no torch.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from pathlib import Path

EXIT_ERROR = 1
EXIT_BAD_INPUT = 64
EXIT_CANNOT_CREATE = 73
EXIT_FAILING = 74
EXIT_STOPPED = 75
EXIT_LOST_PEERS = 76
EXIT_INTERRUPTED = 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# An OSError with one of these numbers tells of storage, a network or limits, not of a path that somebody has typed.
FAILING = (
    *(errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO),
    *(errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
# What gloo and NCCL say when another process has closed the connection, reset it, or been silent for too long.
LOST_PEERS = re.compile(
    r"gloo/transport/|connection (closed|reset) by peer|timed out waiting|socket timeout"
    r"|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL communicator was aborted",
    re.IGNORECASE,
)
PORT_TAKEN = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
OUR_PACKAGES = ("launchers", "training", "data_pipeline", "models")


def exit_code(error: BaseException) -> int:
    """Choose the exit code for an error; EXIT_ERROR is for what only a mistake in the program explains."""
    if lost_its_peers(error):
        return EXIT_LOST_PEERS
    if isinstance(code := getattr(error, "exit_code", None), int):
        return code
    number = getattr(error, "errno", None)  # also of an error that another rank had
    if number in NO_ROOM:
        return EXIT_CANNOT_CREATE
    if number in FAILING:
        return EXIT_FAILING
    if isinstance(error, (ValueError, OSError)) or _port_is_taken(error):
        return EXIT_BAD_INPUT
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_ERROR


def lost_its_peers(error: BaseException) -> bool:
    """Tell whether a collective failed because of another rank."""
    if _is_distributed(error, "DistNetworkError", "DistStoreError"):
        return not _port_is_taken(error)
    return isinstance(error, RuntimeError) and LOST_PEERS.search(str(error)) is not None


def _port_is_taken(error: BaseException) -> bool:
    return _is_distributed(error, "DistNetworkError") and PORT_TAKEN.search(str(error)) is not None


def _is_distributed(error: BaseException, *names: str) -> bool:
    """Tell whether an error is one of these classes of torch.distributed, which is loaded if it raised one."""
    module = sys.modules.get("torch.distributed")
    return module is not None and isinstance(error, tuple(getattr(module, name) for name in names))


def describe(error: BaseException) -> str:
    """Say in one line what went wrong."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if _port_is_taken(error):
        return "MASTER_PORT is in use, perhaps by another run; start with another, as deepspeed --master_port 29501"
    if not lost_its_peers(error):
        return one_line(error)
    said = " ".join(str(error).split()).removesuffix(" GLHF! 🏖️")
    how = "waited in vain for another rank" if "timed out" in said.lower() else "lost another rank"
    return f"{how} in {_place(error)}; see its own message. ({said[:160]})"


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of printable characters."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    said = " ".join(str(error).split())
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in said)


def _place(error: BaseException) -> str:
    """Name the innermost function of ours that the error has passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    return f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "a collective"


def _is_ours(file: str) -> bool:
    root = Path(__file__).resolve().parents[2]
    return any(Path(file).is_relative_to(root / package) for package in OUR_PACKAGES)
