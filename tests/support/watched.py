"""Tiny launchers and ranks for test_watcher.py: the shapes of real ones in the standard library alone, for speed.

Usage, each a process of its own:
    watched.py rank FOLDER LIFE        a rank with a watcher; LIFE says what it does
    FOLDER/bin/deepspeed FOLDER LIFE   runs `-m deepspeed.launcher.launch FOLDER LIFE`, which runs the rank
Every process writes its number to FOLDER/NAME.pid.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-S", "-E"]
ORPHAN_SECONDS = 1.0


def note(folder: Path, name: str) -> None:
    temporary = folder / f"{name}.tmp"
    temporary.write_text(str(os.getpid()))
    temporary.rename(folder / f"{name}.pid")


def write_launchers(folder: Path) -> None:
    """A command `deepspeed` and a module deepspeed.launcher.launch, which treat their child as the real ones do."""
    package = folder / "package" / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    head = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import watched\n"
    (package / "launch.py").write_text(f"{head}sys.exit(watched.launch(sys.argv[1:]))\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "deepspeed").write_text(f"{head}watched.run(sys.argv[1:])\n")


def run(arguments: list[str]) -> None:
    """As the `deepspeed` command: an end by a signal is not an error to it."""
    folder = Path(arguments[0])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
    note(folder, "runner")
    child = subprocess.Popen([*PYTHON, "-m", "deepspeed.launcher.launch", *arguments], cwd=folder / "package")
    child.wait()
    if child.returncode > 0:
        sys.exit(child.returncode)


def launch(arguments: list[str]) -> int:
    """As DeepSpeed's launch.py, for one rank."""
    folder = Path(arguments[0])
    note(folder, "launch")
    child = subprocess.Popen([*PYTHON, __file__, "rank", *arguments])
    signal.signal(signal.SIGTERM, lambda number, frame: (child.kill(), sys.exit(1)))
    while child.poll() is None:
        time.sleep(0.1)
    return 1 if child.returncode else 0


def start_watcher(folder: Path, *, silence_seconds: float, was_launched: bool) -> None:
    sys.path.insert(0, str(ROOT))
    from training.supervision import watcher as program

    memory, stacks = os.memfd_create("beats"), os.memfd_create("stacks")
    os.ftruncate(memory, program.Board.SIZE)
    faulthandler.register(signal.SIGQUIT, file=stacks)
    now = time.monotonic()
    program.Board(memory).write("step 12: forward", now, now + silence_seconds)
    signals, wakeup = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup)
    handle = os.pidfd_open(os.getpid())
    path = str(folder / "stacks.txt")
    orders = program.Orders(os.getpid(), handle, memory, signals, stacks, path, 0, ORPHAN_SECONDS, was_launched, True)
    command = [*PYTHON, "-I", program.__file__, json.dumps(dataclasses.asdict(orders))]
    descriptors = (handle, memory, signals, stacks)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, program.IGNORED_SIGNALS)
    watching = subprocess.Popen(command, pass_fds=descriptors, stdout=subprocess.DEVNULL, start_new_session=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    (folder / "watcher.pid").write_text(str(watching.pid))
    expected = 1 + len(program.find_launchers(os.getpid()))
    while watched_processes(watching.pid) < expected:
        time.sleep(0.01)


def watched_processes(pid: int) -> int:
    """How many processes another one has a handle of."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += "pidfd" in os.readlink(descriptor)
        except OSError:
            pass  # closed meanwhile
    return count


def rank(folder: Path, life: str) -> None:
    silence = 0.2 if life in ("locked", "stopped") else 60.0
    if life == "late":  # its launcher is gone before it is watched
        note(folder, "rank")
        time.sleep(1.0)
    ignores = life == "deaf"
    signal.signal(signal.SIGTERM, (lambda *_: None) if ignores else (lambda *_: os._exit(75)))
    signal.signal(signal.SIGUSR1, lambda *_: None)
    start_watcher(folder, silence_seconds=silence, was_launched=life != "plain")
    note(folder, "rank")
    if life == "short":
        return
    if life == "asked":
        os.kill(os.getpid(), signal.SIGUSR1)
    if life == "locked":
        ctypes.PyDLL(None).sleep(60)
    if life == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.1)


if __name__ == "__main__":
    rank(Path(sys.argv[2]), sys.argv[3])
