"""Faults by name: `kill@disk.fsync.manifest.json:rank=1:count=2` kills rank 1 the second time it gets there.

A fault is written `kind@site[:rank=r][:count=n][:times=t][:seconds=s]`. `site` may end in `*` and is then every site
that begins so; count is the n-th time that this rank reaches any of them. Before a fault acts it appends a line to a
log and forces it to disk, so that a test can assert that its fault fired: a fault that never fires proves nothing.

Sites are the seams of the program, and the calls that change the disk below a folder `checkpoints`: `watch_disk` wraps
these, so that `disk.CALL.NAME` is reached just before the call. The kind `record` does nothing but list every site that
is reached. That is how a sweep begins: ask which sites are passed, then fail the first, the second, the third.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import seams

FOREVER = 3600.0  # seconds; longer than any test


class InjectedFault(RuntimeError):
    """What the kind `exception` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault. rank None: every rank. times: how often in a row it acts, from the count-th time on."""

    kind: str
    site: str
    rank: int | None = None
    count: int = 1
    times: int = 1
    seconds: float = FOREVER  # of the kinds sleep and lock

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a fault of kind '{self.kind}'; accepted: {', '.join(KINDS)}")
        if not self.site or "*" in self.site[:-1]:
            raise ValueError(f"a fault at site '{self.site}'; accepted: a seam's name, or its beginning and one *")
        if self.count < 1 or self.times < 1:
            raise ValueError(f"a fault with count {self.count} and times {self.times}; both start at 1")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read what `str` writes. Raises ValueError."""
        kind, _, rest = text.partition("@")
        site, *options = rest.split(":")
        values = dict(option.split("=") for option in options)
        if unknown := values.keys() - OPTIONS.keys():
            raise ValueError(f"fault '{text}' has option {unknown}; accepted: {', '.join(OPTIONS)}, as name=number")
        return cls(kind, site, **{name: (float if name == "seconds" else int)(text) for name, text in values.items()})

    def __str__(self) -> str:
        changed = [f"{name}={getattr(self, name)}" for name in OPTIONS if getattr(self, name) != OPTIONS[name]]
        return ":".join([f"{self.kind}@{self.site}", *changed])

    def is_at(self, site: str) -> bool:
        """Whether this fault is meant for that site."""
        return site.startswith(self.site[:-1]) if self.site.endswith("*") else site == self.site


OPTIONS = {field.name: field.default for field in fields(Fault) if field.name not in ("kind", "site")}


@dataclass(frozen=True)
class Fired:
    """A line of the log: `fault` acted in `rank` at `site`."""

    fault: str
    rank: int
    site: str


def fired(log: Path) -> list[Fired]:
    """The faults that fired, in the order in which they did, over all ranks."""
    return [Fired(**json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


def sites_reached(log: Path, rank: int) -> list[str]:
    """The sites that a fault of kind `record` saw, in the order in which `rank` reached them."""
    return [line.site for line in fired(log) if line.rank == rank and line.fault.startswith("record@")]


def install(faults: Iterable[str], *, rank: int, log: Path) -> None:
    """Let these faults act in this process from now on."""
    meant = [fault for fault in map(Fault.parse, faults) if fault.rank in (None, rank)]
    seams.install(_Injector(meant, rank, log) if meant else None)


def watch_disk() -> None:
    """Let the calls of this process that change the disk below a folder `checkpoints` each reach a site first.

    os.fsync of `.../checkpoints/step-1/manifest.json` reaches `disk.fsync.manifest.json`, with its descriptor. Folders
    that any rank may make are left out: which one does is chance.
    """
    for name in ("fsync", "mkdir", "rename", "rmdir"):
        setattr(os, name, _watched(name, getattr(os, name)))


def _watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*arguments: Any, **options: Any) -> Any:
        path = _path_of(*arguments, **options)
        is_shared = name == "mkdir" and (path.exists() or not path.name.startswith("."))
        if "checkpoints" in path.parts and not is_shared:
            seams.reach(f"disk.{name}.{path.name}", arguments[0])
        return call(*arguments, **options)

    return watched


def _path_of(*arguments: Any, dir_fd: int | None = None, **_: Any) -> Path:
    """The path that a call of os.fsync, mkdir, rename or rmdir is about; a rename is about its target."""
    if isinstance(arguments[0], int):
        return Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
    place = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path()
    return place / [argument for argument in arguments if not isinstance(argument, int)][-1]


class _Injector:
    """What is installed at the seams of one process."""

    def __init__(self, faults: list[Fault], rank: int, log: Path) -> None:
        self._faults = faults
        self._rank = rank
        self._log = log
        self._reached = [0] * len(faults)
        self._lock = threading.Lock()  # seams are reached from background threads too

    def __call__(self, site: str, value: Any) -> Any:
        for number, fault in enumerate(self._faults):
            if fault.is_at(site) and self._is_due(number):
                self._testify(fault, site)
                outcome = KINDS[fault.kind](fault, value)
                value = outcome if fault.kind == "nan" else value
        return value

    def _is_due(self, number: int) -> bool:
        fault = self._faults[number]
        with self._lock:
            self._reached[number] += 1
            return fault.kind == "record" or 0 <= self._reached[number] - fault.count < fault.times

    def _testify(self, fault: Fault, site: str) -> None:
        line = json.dumps({"fault": str(fault), "rank": self._rank, "site": site}) + "\n"
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
            if fault.kind != "record":
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _tear(fault: Fault, descriptor: int) -> None:
    """Lose the second half of a file that is being forced to disk, and the process with it."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(error: Exception) -> Any:
    raise error


def _hold_interpreter_lock(fault: Fault, value: Any) -> None:
    """Wait in C without giving the lock back, deaf to every signal that can be blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        ctypes.PyDLL(None).usleep(int(min(fault.seconds, 4000) * 1e6))  # C's 32-bit number of microseconds
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What a fault does at its site, with the value that passes there; another value may pass instead.
KINDS: dict[str, Callable[[Fault, Any], Any]] = {
    "kill": lambda fault, value: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda fault, value: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda fault, value: os.kill(os.getpid(), signal.SIGINT),
    "usr1": lambda fault, value: os.kill(os.getpid(), signal.SIGUSR1),
    "enospc": lambda fault, value: _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    "eio": lambda fault, value: _raise(OSError(errno.EIO, os.strerror(errno.EIO))),
    "exception": lambda fault, value: _raise(InjectedFault(f"injected: {fault}")),
    "nan": lambda fault, value: value * math.nan,
    "tear": _tear,
    "exit0": lambda fault, value: os._exit(0),
    "abort": lambda fault, value: os.abort(),
    "segv": lambda fault, value: ctypes.string_at(0),
    "sleep": lambda fault, value: time.sleep(fault.seconds),
    "lock": _hold_interpreter_lock,
    "record": lambda fault, value: None,
}
