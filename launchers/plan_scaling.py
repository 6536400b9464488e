"""Model a training step of every size on every number of GPUs. Nothing is measured.

`python launchers/plan_scaling.py` plans for nodes of 8 H100. Settings describe other machines, such as H200:
`python launchers/plan_scaling.py --gpus 32 cluster.gpu_memory_gib=139 cluster.memory_tb_per_second=4.8`

A step has the same images on any number of GPUs. For each way of checkpointing the micro-batch is the largest that fits
and divides a GPU's images; a row shows the way whose modelled step is the shortest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from launchers.setup.command_line import Command, run_launcher, say
from launchers.setup import tables
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig
from models.var import CHECKPOINTINGS, FULL_CHECKPOINTING
from training.engine.engine import EngineConfig
from training.flops import training_flops
from training.planning.memory import estimate_memory, largest_micro_batch
from training.planning.step_time import ClusterConfig, StepTime, step_time

SIZES = ("d16", "d20", "d24", "d30", "d36_512")
PLACE = ("size", "parameters", "TFLOP an image", "GPUs", "stage")
PLANNED = ("checkpointing", "images a GPU", "fit", "GiB a GPU", "step, s", "sending", "images/s", "MFU")
NONE_FITS = "none fits"


@dataclass(frozen=True, kw_only=True)
class PlanScalingConfig:
    """The settings of launchers/plan_scaling.py: what the table has rows for."""

    sizes: tuple[str, ...] = tuple(f"configs/{name}.yaml" for name in SIZES)  # configs of launchers/train.py
    gpus: tuple[int, ...] = (8, 64, 512)
    stages: tuple[int, ...] = (1, 3)  # of ZeRO
    global_batch: int = 2048  # images a step, at most; each GPU takes as many as another
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        for name in ("sizes", "gpus", "stages"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it needs at least one")
        if min(self.gpus) < 1:
            raise ValueError(f"gpus has {min(self.gpus)}; a number of GPUs is 1 or more")
        if self.global_batch < max(self.gpus):
            raise ValueError(f"global_batch is {self.global_batch}; {max(self.gpus)} GPUs need an image each")


@dataclass(frozen=True)
class Plan:
    """How one size is trained under one ZeRO stage on one number of GPUs."""

    engine: EngineConfig
    accumulation: int
    fit: int  # the most images that would fit at once with this checkpointing
    peak_bytes: int
    time: StepTime


def launch(command: Command[PlanScalingConfig]) -> None:
    config = command.config
    if command.dry_run:
        say(f"would model {len(config.sizes) * len(config.gpus) * len(config.stages)} steps")
        return
    say(table(config))


def table(config: PlanScalingConfig) -> str:
    """Return a table with a row for each size, number of GPUs and ZeRO stage."""
    rows = []
    for path in config.sizes:
        train = load_config(TrainConfig, path)
        model = (f"{train.model.num_parameters / 1e6:,.0f} M", f"{training_flops(train.model) / 1e12:.2f}")
        for gpus, stage in product(config.gpus, config.stages):
            staged = replace(train, engine=replace(train.engine, zero_stage=stage))
            rows.append((Path(path).stem, *model, str(gpus), str(stage), *_cells(config, staged, gpus)))
    return tables.table(PLACE + PLANNED, rows)


def best_plan(config: PlanScalingConfig, train: TrainConfig, gpus: int) -> Plan | None:
    """Return the plan whose step is the shortest, or None if no checkpointing makes room for one image."""
    ways = (replace(train.engine, activation_checkpointing=way) for way in CHECKPOINTINGS)
    plans = [plan for engine in ways if (plan := _plan(config, train, engine, gpus)) is not None]
    return min(plans, key=lambda plan: plan.time.total, default=None)


def _plan(config: PlanScalingConfig, train: TrainConfig, engine: EngineConfig, gpus: int) -> Plan | None:
    model, averages, share = train.model, train.optimizer.ema_decay > 0, config.global_batch // gpus
    fit = largest_micro_batch(model, engine, gpus, config.cluster.usable_bytes, averages=averages)
    if not fit:
        return None
    images = max(number for number in range(1, min(fit, share) + 1) if share % number == 0)
    engine, accumulation = replace(engine, micro_batch=images), share // images
    peak = estimate_memory(model, engine, gpus, averages=averages).peak.total
    time = step_time(model, engine, config.cluster, gpus, accumulation=accumulation, averages=averages)
    return Plan(engine, accumulation, fit, peak, time)


def _cells(config: PlanScalingConfig, train: TrainConfig, gpus: int) -> tuple[str, ...]:
    plan = best_plan(config, train, gpus)
    if plan is None:
        least = replace(train.engine, micro_batch=1, activation_checkpointing=FULL_CHECKPOINTING)
        peak = estimate_memory(train.model, least, gpus, averages=train.optimizer.ema_decay > 0).peak.total
        return (NONE_FITS, "1", "0", f"{peak / 2**30:.1f}", "", "", "", "")
    time = plan.time
    return (
        plan.engine.activation_checkpointing,
        f"{plan.engine.micro_batch} x {plan.accumulation}",
        str(plan.fit),
        f"{plan.peak_bytes / 2**30:.1f}",
        f"{time.total:.3f}",
        f"{time.exposed / time.total:.0%}",
        f"{time.images_per_second:,.0f}",
        f"{time.mfu:.0%}",
    )


def main() -> None:
    run_launcher(PlanScalingConfig, launch, __doc__)


if __name__ == "__main__":
    main()
