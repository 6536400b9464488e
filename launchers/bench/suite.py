"""`benchmark.py suite`: every figure of docs/speed.md in one command, on the machine at hand.

Each benchmark runs in a process of its own, so that one which fails, for want of memory or of anything else, costs its
own rows alone, and a GPU's memory is free for the next. The report is written after each: a suite that was cut short
goes on by the same command. On a GPU: d16 to d30 in bf16, batches chosen by the planner.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from launchers.bench.config import OURS, BenchmarkConfig
from launchers.bench.report import Report, unfinished_rows, write_report
from launchers.bench.timing import Row
from launchers.setup.command_line import say
from models.attention import FLEX
from models.var import FULL_CHECKPOINTING, VARConfig
from training.engine.engine import EngineConfig
from training.planning.memory import largest_micro_batch

GPU_DEPTHS = (24, 30, 16, 20)
SAMPLED_DEPTHS = (16, 30)
SAMPLED_AT_ONCE, FEWER_AT_ONCE, MANY_AT_ONCE = 64, [1, 4, 16, 32], 256
USABLE_SHARE = 0.85  # of a GPU's memory; the rest is that of CUDA's contexts, of libraries, and lost to fragments
PUBLIC_STATE = 16  # bytes of a parameter that the public trainer keeps: weights, moments and gradients in float32
MOST_SECONDS = 3600  # of one benchmark: what hangs must not take all others with it
EVEN_BATCH = 8
BESIDE_PUBLIC = ("train", "sample", "tokenizer")
ERROR_LINE = re.compile(r"error: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")
LAUNCHER = Path(__file__).parents[1] / "benchmark.py"

Settings = dict[str, Any]


def benchmark_suite(config: BenchmarkConfig, report: Report) -> list[Row]:
    """Run all benchmarks and return their rows, each with its benchmark's title; a failure is a row with its reason.

    `report`, with the rows so far, is written to config.out after each benchmark.
    """
    earlier, rows = unfinished_rows(report, config.out), []
    write_report(report | {"rows": earlier}, config.out)  # what cannot be written is known now, not in half an hour
    for settings in plan_suite(config):
        title = title_of(settings)
        kept = [row for row in earlier if row["part"] == title]
        say(f"-- {title}{f', kept from {config.out}' if kept else ''}")
        rows += kept or [row | {"part": title} for row in run_or_run_less(settings)]
        if not kept:
            write_report(report | {"rows": rows}, config.out)
    return rows


def title_of(settings: Settings) -> str:
    """Return a title such as "train d16, 88 images"."""
    words = [settings["what"]]
    words += ["alone"] if settings.get("contestants") == OURS else []
    words += [f"d{settings['depth']}"] if "depth" in settings else []
    words += [settings["attention"]] if "attention" in settings else []
    if checkpointing := settings.get("activation_checkpointing"):
        words.append(f"{checkpointing} checkpointing")
    return " ".join(words) + (f", {settings['batch']} images" if "batch" in settings else "")


def plan_suite(config: BenchmarkConfig) -> list[Settings]:
    """Return the settings of each benchmark, in their order."""

    def part(what: str, **settings: Any) -> Settings:
        beside = {"against": config.against} if what in BESIDE_PUBLIC and config.against else {}
        return {"what": what, "repeats": config.repeats} | beside | settings

    if not torch.cuda.is_available():
        names = ("train", "sample", "tokenizer", "attention", "data")
        return [part(what, **{"batches": [1, 2]} if what == "sample" else {}) for what in names]

    total, fast = torch.cuda.get_device_properties(0).total_memory, {"precision": "bf16", "compile": True}
    alone = {
        depth: {"what": "train", "contestants": OURS, "repeats": config.repeats, "depth": depth} | fast
        | {"batch": batch_alone(depth, total)}
        for depth in GPU_DEPTHS
    }  # fmt: skip
    beside = {depth: part("train", depth=depth, batch=batch_beside(depth, total), **fast) for depth in GPU_DEPTHS}
    flex = alone[24] | {"attention": FLEX}
    eager = alone[30] | {"compile": False, "activation_checkpointing": FULL_CHECKPOINTING}
    return [  # what says most comes first, should there be no time for all
        alone.pop(24),
        beside.pop(16),
        *(
            part("sample", depth=depth, batch=SAMPLED_AT_ONCE, batches=FEWER_AT_ONCE, **fast)
            for depth in SAMPLED_DEPTHS
        ),
        *alone.values(),
        *beside.values(),
        flex,
        eager,
        part("attention", precision="bf16"),
        part("tokenizer", precision="bf16", batch=8),
        part("sample", depth=16, batch=MANY_AT_ONCE, **fast),  # late: the caches of the public code may not fit
        part("data", precision="bf16"),
    ]


def batch_alone(depth: int, total_bytes: int) -> int:
    """Return the most images that one trainer with compiled blocks fits."""
    return most_images(depth, USABLE_SHARE * total_bytes, compiles=True)


def batch_beside(depth: int, total_bytes: int) -> int:
    """Return the most images that fit beside the state of the public trainer; a step's memory the two have in turns.

    The public code keeps no more of an image than ours does where it is not compiled.
    """
    state = PUBLIC_STATE * VARConfig(depth=depth).num_parameters
    return most_images(depth, USABLE_SHARE * total_bytes - state, compiles=False)


def most_images(depth: int, memory_bytes: float, *, compiles: bool) -> int:
    """Return the most images that fit by the planner, rounded down, and at least one."""
    engine = EngineConfig(precision="bf16", micro_batch=1, compile=compiles)
    return round_down(largest_micro_batch(VARConfig(depth=depth), engine, 1, memory_bytes))


def round_down(images: int) -> int:
    """Round to a multiple of 8 from 8 on, and to at least one."""
    return images - images % EVEN_BATCH if images >= EVEN_BATCH else max(1, images)


class ChildFailed(Exception):
    """A benchmark's process has ended without figures; the message is the reason in one line."""


def run_or_run_less(settings: Settings) -> list[Row]:
    """Return the rows of one benchmark. A failure is a row with its reason, and something less is run in its place.

    Names of rows begin with the benchmark's title. A reason may hold the path of the public code as it was given, not
    where it leads to.
    """
    title = f"{title_of(settings)}: "
    try:
        return [row | {"name": title + row["name"], "settings": settings} for row in run_apart(settings)]
    except ChildFailed as failure:
        name, reason = f"{title}failed", str(failure)
    if against := settings.get("against"):
        name, reason = f"{name} beside the public code", reason.replace(str(Path(against).resolve()), against)
    say(f"{name}: {reason}")
    less = something_less(settings, reason)
    row = {"name": name, "reason": reason, "settings": settings}
    return [row, *(run_or_run_less(less) if less is not None else [])]


def something_less(settings: Settings, reason: str) -> Settings | None:
    """Return a step with three quarters of the images, or ours without the public code; None if neither helps."""
    is_training, batch = settings["what"] == "train", settings.get("batch", 1)
    if is_training and "out of memory" in reason and batch > EVEN_BATCH:
        return settings | {"batch": round_down(3 * batch // 4)}
    if "against" in settings:
        less = {name: value for name, value in settings.items() if name != "against"}
        return less | ({"contestants": OURS} if is_training and torch.cuda.is_available() else {})
    return None


def run_apart(settings: Settings) -> list[Row]:
    """Run one benchmark in a process of its own and return its rows. Raises ChildFailed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        given = [f"{name}={value}" for name, value in settings.items()]
        code, errors = run_group([sys.executable, str(LAUNCHER), *given, f"out={out}"])
        if code == 0:
            return json.loads(out.read_text())["rows"]
    raise ChildFailed(reason_of(errors) or f"exit code {code}")


def run_group(command: list[str]) -> tuple[int, str]:
    """Return a command's exit code and its stderr, and end all processes that it has started.

    Raises ChildFailed after MOST_SECONDS.
    """
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            _, errors = child.communicate(timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"was not done after {MOST_SECONDS} s") from None
        finally:  # also on Ctrl-C, which a session of its own does not get
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, errors


def reason_of(errors: str) -> str:
    """Return the last line that names an error, since libraries go on talking after it; else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named_errors = [line for line in lines if ERROR_LINE.match(line)]
    return (named_errors or lines or [""])[-1]
