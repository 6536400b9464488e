"""What stands in a benchmark's .json beside its figures: when, by which command, on what and with which versions.

No name of a host and no path is in it, but for those that the command itself was given.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.collect_env import get_nvidia_driver_version, run

from data_pipeline.files.atomic import atomic_file
from launchers.bench.config import BenchmarkConfig
from launchers.bench.timing import Row
from training.engine.distributed import World
from training.tracking.mlflow import code_version

Report = dict[str, Any]
USED_BY_PUBLIC = ("flash-attn", "xformers")  # by the public code where they are installed
MUST_AGREE = ("machine", "versions", "settings")  # of figures that may stand in one table


def begin_report(config: BenchmarkConfig, arguments: Sequence[str]) -> Report:
    """A report without rows. `arguments` are those of the command line."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "launchers/benchmark.py", *arguments]),
        "machine": describe_machine(),
        "versions": versions(),
        "settings": asdict(config),
        "finished": False,
        "rows": [],
    }


def describe_machine() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "card": card and card.name,
        "card_bytes": card and card.total_memory,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": World.from_environment().world_size,
    }


def cpu_model() -> str:
    """As Linux names it; elsewhere the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def versions() -> dict[str, Any]:
    """None for what is not here."""
    on_cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": get_nvidia_driver_version(run) if on_cuda else None,
        "deepspeed": _installed("deepspeed"),
        "nextscale": _installed("nextscale"),
        **{package: _installed(package) for package in USED_BY_PUBLIC},
        "commit": code_version(),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_report(report: Report, out: str) -> None:
    """Replace the file `out`, whose folder is made; nothing where `out` is empty."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(out)) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")


def unfinished_rows(report: Report, out: str) -> list[Row]:
    """The rows in the file `out` of a report that was cut short and can go on as `report`; else none."""
    try:
        found = json.loads(Path(out).read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(found, dict) or found.get("finished") is not False:
        return []
    wanted = json.loads(json.dumps(report))  # a tuple becomes a list
    return found["rows"] if all(_fixed(found.get(name)) == _fixed(wanted[name]) for name in MUST_AGREE) else []


def _fixed(part: Any) -> Any:
    """Without the driver, which one card may have in two versions on two days."""
    return {name: value for name, value in part.items() if name != "driver"} if isinstance(part, dict) else part
