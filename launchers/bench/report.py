"""What a benchmark reports: a table for people, and a .json that says when, how, on what and with which versions.

No name of a host and no path is in it, but for those that the command itself was given.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file
from launchers.bench.config import BenchmarkConfig
from launchers.bench.timing import Row
from launchers.setup.tables import table
from training.engine.distributed import World
from training.tracking.mlflow import code_version

import torch
from torch.utils.collect_env import get_nvidia_driver_version, run

Report = dict[str, Any]
PACKAGES = ("deepspeed", "nextscale", "flash-attn", "xformers")  # the public code uses the last two if it finds them
MUST_AGREE = ("machine", "versions", "settings")  # of figures that may stand in one table

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # of a row, in their order: heading and text
    "samples_per_second": ("samples/s", "{:,.3f}".format),
    "slowest": ("slowest", "{:,.3f}".format),
    "fastest": ("fastest", "{:,.3f}".format),
    "ratio": ("ratio", "{:.3f}".format),
    "ratio_to_bare": ("to bare", "{:.3f}".format),
    "ratio_to_encoding": ("to encoding", "{:.3f}".format),
    "tflops": ("TFLOP/s", "{:.3g}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "working_bytes": ("working", lambda size: f"{size / 2**30:.2f} GiB"),
    "peak_bytes": ("peak", lambda size: f"{size / 2**30:.2f} GiB"),
    "equal_codes": ("same codes", "{:.2%}".format),
    "data_wait_ms": ("data wait", "{:.1f} ms".format),
    "data_wait_share": ("of a step", "{:.2%}".format),
    "reason": ("reason", str),
}


def rows_table(rows: list[Row]) -> str:
    """Return the rows as a table with the columns that any of them has."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    cells = [[row["name"], *(COLUMNS[name][1](row[name]) if name in row else "" for name in shown)] for row in rows]
    return table(["", *(COLUMNS[name][0] for name in shown)], cells)


def begin_report(config: BenchmarkConfig, arguments: Sequence[str]) -> Report:
    """Return a report without rows. `arguments` are those of the command line."""
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
    """Return what figures depend on: card, processor, threads and ranks."""
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
    """Return the processor as Linux names it; elsewhere the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def versions() -> dict[str, Any]:
    """Return the versions of all that figures depend on; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": get_nvidia_driver_version(run) if torch.cuda.is_available() else None,
        **{package: _installed(package) for package in PACKAGES},
        "commit": code_version(),
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_report(report: Report, out: str) -> None:
    """Replace the file `out`, making its folder; do nothing where `out` is empty."""
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(out)) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")


def unfinished_rows(report: Report, out: str) -> list[Row]:
    """Return the rows in the file `out` if its report was cut short and `report` can go on from it; else none."""
    try:
        found = json.loads(Path(out).read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(found, dict) or found.get("finished") is not False:
        return []
    wanted = json.loads(json.dumps(report))  # a tuple becomes a list
    return found["rows"] if all(_fixed(found.get(name)) == _fixed(wanted[name]) for name in MUST_AGREE) else []


def _fixed(part: Any) -> Any:
    """Leave out the driver, which may be updated between two runs on the same card."""
    return {name: value for name, value in part.items() if name != "driver"} if isinstance(part, dict) else part
