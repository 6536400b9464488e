"""What a process forked for `project.ForkedProject` does: run a launcher's file as Python runs what a user types."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from training.engine import distributed

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(name: str, arguments: list[str], folder: str, alone: bool) -> None:
    """launchers/NAME.py with a command line in a folder; alone: as if no launcher of ranks had started it."""
    os.chdir(folder)
    if alone:
        for variable in PLACE:
            del os.environ[variable]
    distributed._share_of_cores = lambda world, by_srun: 1  # these tensors are too small to share
    sys.argv = [str(LAUNCHERS / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
