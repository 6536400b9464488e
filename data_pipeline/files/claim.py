"""One owner at a time of what a command writes, and a line that names the owner to whoever comes second.

The kernel's lock of the file tells whether the owner lives, on one host and on shared storage that passes locks on. For
storage that does not, the owner renews the file's time every RENEW_SECONDS, and its claim counts for STALE_SECONDS.
filelock, the library, neither says who holds a lock nor lets another host take over a dead holder's.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.files.locks import release_lock, take_lock
from data_pipeline.files.strict_json import read_json

NAME = ".owner"  # of the file in a folder that is claimed
RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0


class Claimed(OSError):
    """Another process is writing here."""

    exit_code: ClassVar[int] = 73


@contextmanager
def claimed(file: Path, what: Path, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Own `what` while the block runs. file: the claim, `FOLDER/.owner` or a file beside what does not exist yet.

    A claim is taken over from an owner that is dead: on this host at once; from another host STALE_SECONDS after its
    last sign of life, or at once by the same Slurm job when it was started again.

    Raises:
        Claimed: somebody owns it; the line names host, process, job and what to do.
    """
    descriptor = _take(file)
    owner = _read_owner(file)
    if descriptor is None or _lives_elsewhere(file, owner, environment):
        if descriptor is not None:
            release_lock(descriptor)
        raise Claimed(
            f"{what} is being written by {_described(owner)}; wait until it has ended, stop it, or name another "
            f"folder (a claim of another host counts for {STALE_SECONDS:g} s after its last sign of life)"
        )
    _write(descriptor, _this_process(environment))
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(descriptor, ended), name="claim", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with suppress(OSError):  # the storage is gone, or the folder was moved
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                file.unlink()
        release_lock(descriptor)


def claimed_folder(folder: Path) -> AbstractContextManager[None]:
    """Own a folder, made if need be, while the block runs; see `claimed`."""
    folder.mkdir(parents=True, exist_ok=True)
    return claimed(folder / NAME, folder)


def is_claimed(folder: Path) -> bool:
    """Tell whether a living process owns a folder."""
    file = folder / NAME
    if not file.exists():
        return False
    descriptor = _take(file)
    if descriptor is None:
        return True
    try:
        return _lives_elsewhere(file, _read_owner(file), os.environ)
    finally:
        release_lock(descriptor)


def _take(file: Path) -> int | None:
    """Lock a claim, made if need be; None if another process has the lock."""
    while (descriptor := take_lock(file)) is not None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        release_lock(descriptor)  # of a claim that was given back, and removed, meanwhile
    return None


def _this_process(environment: Mapping[str, str]) -> dict[str, Any]:
    job = environment.get("SLURM_JOB_ID", "")
    restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "restarts": restarts, "since": time.time()}


def _read_owner(file: Path) -> dict[str, Any]:
    """Return what the claim says of its owner; nothing for one that is being written."""
    try:
        owner = read_json(file)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _lives_elsewhere(file: Path, owner: dict[str, Any], environment: Mapping[str, str]) -> bool:
    """Tell whether the owner is on another host, whose locks may not reach this one, and has lately shown life."""
    mine = _this_process(environment)
    if not owner or owner.get("host") == mine["host"]:
        return False
    if mine["job"] and mine["job"] == owner.get("job") and mine["restarts"] > owner.get("restarts", 0):
        return False
    with tempfile.TemporaryFile(dir=file.parent) as probe:  # the storage's own clock: those of hosts differ
        return os.fstat(probe.fileno()).st_mtime - file.stat().st_mtime < STALE_SECONDS


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    job = f", job {owner['job']}" if owner.get("job") else ""
    since = time.strftime("%H:%M:%S", time.localtime(owner.get("since", 0)))
    return f"process {owner.get('pid')} on {owner.get('host')}{job}, since {since}"


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    content = json.dumps(owner).encode() + b"\n"
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def _renew(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        with suppress(OSError):  # comes again at the next write of the owner itself
            os.utime(descriptor)
