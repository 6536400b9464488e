"""`benchmark.py suite`: every figure of docs/benchmarks.md in one command, on the machine at hand.

Each benchmark runs in a process of its own, so that one which fails, for want of memory or of anything else, costs its
own rows alone, and a GPU's memory is free for the next. On a GPU: d16 to d30 in bf16, batches chosen by the planner.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from launchers.benchmark_config import BenchmarkConfig
from launchers.benchmark_timing import Row
from launchers.command_line import say
from models.attention import FLEX
from models.var import VARConfig
from training.engine import EngineConfig
from training.memory import largest_micro_batch

GPU_DEPTHS = (16, 20, 24, 30)
SAMPLED_DEPTHS = (16, 30)
SAMPLED_AT_ONCE = 64
USABLE_SHARE = 0.9  # of a GPU's memory, which ours and the public code's processes share
LAUNCHER = Path(__file__).with_name("benchmark.py")

Settings = dict[str, Any]


def benchmark_suite(config: BenchmarkConfig) -> list[Row]:
    """The rows of all benchmarks, each with the name of its own first; what fails is a row that says why."""
    planned = gpu_suite(config) if torch.cuda.is_available() else cpu_suite(config)
    rows: list[Row] = []
    for settings in planned:
        title = " ".join(str(settings[name]) for name in ("what", "depth", "attention") if name in settings)
        say(f"-- {title}")
        rows += [row | {"name": f"{title}: {row['name']}"} for row in run_alone(settings)]
    return rows


def cpu_suite(config: BenchmarkConfig) -> list[Settings]:
    """d8 in float32, as the README's figures are."""
    names = ("train", "switches", "sample", "tokenizer", "memory", "attention", "data")
    return [common(config) | {"what": what} for what in names]


def gpu_suite(config: BenchmarkConfig) -> list[Settings]:
    """The sizes of the paper in bf16 with compiled blocks; sampling at 64 images."""
    total = torch.cuda.get_device_properties(0).total_memory
    shared = common(config) | {"precision": "bf16"}
    fast = shared | {"compile": True}
    batches = {depth: planned_batch(depth, total) for depth in GPU_DEPTHS}
    training = [fast | {"what": "train", "depth": depth, "batch": batches[depth]} for depth in GPU_DEPTHS]
    sampling = [fast | {"what": "sample", "depth": depth, "batch": SAMPLED_AT_ONCE} for depth in SAMPLED_DEPTHS]
    flex = training[2] | {"attention": FLEX}
    switches = shared | {"what": "switches", "depth": 16, "batch": max(1, batches[16] // 4)}
    others = [shared | {"what": what, "depth": 16} for what in ("memory", "tokenizer", "attention", "data")]
    return [*training, flex, *sampling, switches, *others]


def planned_batch(depth: int, total_bytes: int) -> int:
    """The largest power of two of images that fits when two trainers share the memory."""
    engine = EngineConfig(precision="bf16", micro_batch=1)
    most = largest_micro_batch(VARConfig(depth=depth), engine, 1, USABLE_SHARE * total_bytes / 2)
    return 2 ** (max(most, 1).bit_length() - 1)


def common(config: BenchmarkConfig) -> Settings:
    return {"repeats": config.repeats, "against": config.against}


def run_alone(settings: Settings) -> list[Row]:
    """One benchmark in a process of its own; its rows, or one that says why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        given = [f"{name}={value}" for name, value in settings.items() if value != ""]
        ended = subprocess.run(
            [sys.executable, str(LAUNCHER), *given, f"out={out}"], stderr=subprocess.PIPE, text=True, check=False
        )
        if ended.returncode == 0:
            return json.loads(out.read_text())["rows"]
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {ended.returncode}"
    say(f"failed: {reason}")
    return [{"name": f"failed: {reason}"}]
