"""Measure speed side by side: `python launchers/benchmark.py train`, and so on for train, sample, tokenizer, data,
attention; `suite` runs them all.

What is compared is timed in turns within one process tree, so that a busy machine slows both; a ratio is the median of
those of the turns. `--against PATH` sets the public VAR code, from a checkout at PATH, beside ours. On several GPUs
`deepspeed launchers/benchmark.py train contestants=ours zero_stage=3` measures a ZeRO stage; rates are those of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from launchers.bench.attention import benchmark_attention
from launchers.bench.config import OURS, BenchmarkConfig
from launchers.bench.data import benchmark_data
from launchers.bench.report import begin_report, rows_table, write_report
from launchers.bench.sample import benchmark_sample
from launchers.bench.suite import benchmark_suite, plan_suite, title_of
from launchers.bench.timing import Row, device_type
from launchers.bench.tokenizer import benchmark_tokenizer
from launchers.bench.train import benchmark_train
from launchers.setup.command_line import Command, run_launcher, say
from training.engine.distributed import World, leave_world

BENCHMARKED: dict[str, Callable[[BenchmarkConfig], list[Row]]] = {
    "train": benchmark_train,
    "sample": benchmark_sample,
    "tokenizer": benchmark_tokenizer,
    "data": benchmark_data,
    "attention": benchmark_attention,
}


def launch(command: Command[BenchmarkConfig]) -> None:
    """Measure what the config names; show a table, and write a report where the config names a file."""
    config = command.config
    if command.dry_run:
        say(f"would time {config.what}, {config.repeats} times in turns")
        for settings in plan_suite(config) if config.what == "suite" else ():
            say(title_of(settings))
        return
    world = World.from_environment()
    check_ranks(config, world.world_size)
    check_device(world)
    report = begin_report(config, sys.argv[1:])
    rows = benchmark_suite(config, report) if config.what == "suite" else BENCHMARKED[config.what](config)
    if world.is_rank_zero:
        write_report(report | {"finished": True, "rows": rows}, config.out)
        say(rows_table(rows))
        if config.out:
            say(f"written to {config.out}")
    if world.world_size > 1:
        leave_world()


def check_ranks(config: BenchmarkConfig, world_size: int) -> None:
    """Raise ValueError where several ranks were started for what is measured on one."""
    if world_size > 1 and config.contestants != OURS:
        raise ValueError(
            f"{world_size} ranks were started, but {config.what} is measured on one: start it with python; "
            "several ranks take train with contestants=ours"
        )


def check_device(world: World) -> None:
    """Raise ValueError where training would leave a GPU alone that everything else here would measure."""
    if world.device.type != device_type():
        raise ValueError(
            "DS_ACCELERATOR is cpu, but there is a GPU, and all that is compared must use the same; "
            "unset it, or hide the GPU: CUDA_VISIBLE_DEVICES="
        )


def main() -> None:
    run_launcher(BenchmarkConfig, launch, __doc__)


if __name__ == "__main__":
    main()
