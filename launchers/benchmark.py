"""Speed and memory, measured side by side: `python launchers/benchmark.py train`, and so on for all BENCHMARKS.

What is compared is timed in turns within one process tree, so that a busy machine slows both; a ratio is the median of
those of the turns. `--against PATH` sets the public VAR code, from a checkout at PATH, beside ours.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from data_pipeline.files import atomic_file  # noqa: E402
from launchers.benchmark_attention import benchmark_attention  # noqa: E402
from launchers.benchmark_config import BenchmarkConfig  # noqa: E402
from launchers.benchmark_data import benchmark_data  # noqa: E402
from launchers.benchmark_memory import benchmark_memory  # noqa: E402
from launchers.benchmark_sample import benchmark_sample  # noqa: E402
from launchers.benchmark_suite import benchmark_suite  # noqa: E402
from launchers.benchmark_timing import Row, table  # noqa: E402
from launchers.benchmark_tokenizer import benchmark_tokenizer  # noqa: E402
from launchers.benchmark_train import benchmark_switches, benchmark_train  # noqa: E402
from launchers.command_line import Command, run_launcher, say  # noqa: E402

BENCHMARKED: dict[str, Callable[[BenchmarkConfig], list[Row]]] = {
    "train": benchmark_train,
    "switches": benchmark_switches,
    "sample": benchmark_sample,
    "tokenizer": benchmark_tokenizer,
    "data": benchmark_data,
    "attention": benchmark_attention,
    "memory": benchmark_memory,
    "suite": benchmark_suite,
}


def launch(command: Command[BenchmarkConfig]) -> None:
    config = command.config
    if command.dry_run:
        say(f"would time {config.what}, {config.repeats} times in turns")
        return
    rows = BENCHMARKED[config.what](config)
    report = {"machine": describe_machine(), "settings": asdict(config), "rows": rows}
    say(table(rows))
    if config.out:
        with atomic_file(Path(config.out)) as file:
            file.write(json.dumps(report, indent=1).encode() + b"\n")
        say(f"written to {config.out}")


def describe_machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "machine": platform.machine(), "cores": os.cpu_count(), "device": device}


def main() -> None:
    run_launcher(BenchmarkConfig, launch, __doc__)


if __name__ == "__main__":
    main()
