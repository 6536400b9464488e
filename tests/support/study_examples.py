"""Scaling studies with known answers: runs whose metrics are planted, their folders, and fits written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launchers.setup.config_files import to_yaml
from launchers.setup.settings import TrainConfig
from launchers.study.config import StudyConfig
from launchers.study.reading import MeasuredRun, Study
from models.var import VARConfig
from training.flops import eq8_parameters, flops_per_image
from training.laws.study_data import METRICS, TrainedSize
from training.laws.study_fit import (
    COMPUTE,
    FITTED,
    PARAMETERS,
    FitConfig,
    FrontierLaw,
    HeldOut,
    Interval,
    LawFit,
    ParametricFit,
    PowerLaw,
    SeedNoise,
    Sensitivity,
    StudyFit,
)
from training.loop_config import LoopConfig
from training.tracking.record import RunRecord

DEPTHS = (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30)
IMAGES = 1_281_167  # in an epoch
LOOP = LoopConfig()
STEPS = LOOP.total_steps(IMAGES)
CEILING = np.log(4096)  # of an untrained model
# of each metric: irreducible part, then factor and exponent for billions of parameters and for billions of tokens
PLANTED = {
    "loss_last": (4.2, 0.85, 0.23, 1.9, 0.30),
    "loss_avg": (5.0, 0.82, 0.20, 1.6, 0.30),
    "error_last": (0.0, 0.905, 0.016, 0.02, 0.20),
    "error_avg": (0.0, 0.937, 0.010, 0.01, 0.20),
}


def planted_run(depth: int, *, seed: int = 0, noise: float = 0.0, num_points: int = 25) -> TrainedSize:
    """A finished run of one size on ImageNet, evaluated at points that are log-spaced in compute."""
    config = VARConfig(depth=depth)
    generator = np.random.default_rng([depth, seed])
    images = np.unique(np.geomspace(STEPS / 1000, STEPS, num_points).round().astype(np.int64)) * LOOP.global_batch
    billions, tokens = config.num_parameters / 1e9, images * 680 / 1e9
    metrics = {}
    for metric, (irreducible, factor, exponent, token_factor, token_exponent) in PLANTED.items():
        values = irreducible + factor * billions**-exponent + token_factor * tokens**-token_exponent
        values *= 1 + noise * generator.standard_normal(len(images))
        metrics[metric] = np.minimum(values, CEILING if metric.startswith("loss") else 1.0)
    return TrainedSize(
        name=f"d{depth}-seed{seed}",
        depth=depth,
        seed=seed,
        num_parameters=config.num_parameters,
        eq8_parameters=eq8_parameters(config),
        tokens_per_image=680,
        flops_per_image=flops_per_image(config),
        images=images,
        metrics=metrics,
        is_finished=True,
    )


def planted_runs(depths: Sequence[int] = DEPTHS, *, noise: float = 0.0) -> list[TrainedSize]:
    """Return one run a depth, and two more seeds of the smallest."""
    more = [planted_run(depths[0], seed=seed, noise=noise or 1e-3) for seed in (1, 2)]
    return [planted_run(depth, noise=noise) for depth in depths] + more


def law_through(metric: str, variable: str, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> LawFit:
    """A straight line in log-log, with what else a fit says of it made up around it."""
    irreducible = PLANTED[metric][0]
    exponent, offset = np.polyfit(np.log(x), np.log(y - irreducible), 1)
    law = PowerLaw(float(exponent), float(np.exp(offset / exponent)), irreducible)
    noise = np.random.default_rng(0).normal(size=(40, 2)) * [0.02, 0.002]
    draws = [(exponent * (1 + e), law.scale ** (1 / (1 + e)) * (1 + s), irreducible) for e, s in noise]
    residuals = np.log((y - irreducible) / law.reducible(x))
    is_loss, last = irreducible > 0, float(y[-1])
    around = Interval(law.exponent * 1.05, law.exponent * 0.95)
    interval = Interval(last - 0.02, last + 0.03)
    held_out = HeldOut(names[-1], float(x[-1]), last, last + 0.01, interval, 0.01, 0.01, 0.1, True)
    return LawFit(
        metric=metric,
        variable=variable,
        law=law,
        source_of_irreducible=FITTED if is_loss else "an error rate can fall to 0",
        exponent_interval=around,
        exponent_t_interval=around,
        scale_interval=Interval(law.scale * 0.9, law.scale * 1.1),
        irreducible_interval=Interval(irreducible - 0.1, irreducible + 0.1) if is_loss else None,
        pearson=float(np.corrcoef(np.log(x), np.log(y - irreducible))[0, 1]),
        r_squared=0.99876,
        runs_test=0.54321,
        names=tuple(names),
        x=tuple(map(float, x)),
        y=tuple(map(float, y)),
        residuals=tuple(map(float, residuals)),
        sensitivity=(Sensitivity(irreducible - 0.2, law.exponent * 0.9, -0.9987, None),) if is_loss else (),
        held_out=(held_out,),
        left_out=(),
        draws=tuple((float(a), float(b), float(c)) for a, b, c in draws),
    )


def planted_fit(runs: Sequence[TrainedSize]) -> StudyFit:
    """Fits of a study's first seeds: of their ends against parameters, and of the ends' compute as a frontier."""
    first = [run for run in runs if run.seed == runs[0].seed]
    billions = np.array([run.num_parameters for run in first]) / 1e9
    pflop = np.array([run.compute("exact")[-1] for run in first])
    ends = {metric: np.array([run.final(metric) for run in first]) for metric in METRICS}
    names = [run.size for run in first]
    laws = [law_through(metric, PARAMETERS, names, billions, ends[metric]) for metric in METRICS]
    laws += [law_through(metric, COMPUTE, names, pflop, ends[metric]) for metric in METRICS]
    frontiers = tuple(
        (law.metric, tuple(FrontierLaw(name, law.law, None) for name in ("non-dominated", "interior minima")))
        for law in laws
        if law.variable == COMPUTE
    )
    irreducible, *rest = PLANTED["loss_avg"]
    a, b = rest[1], rest[3]
    draws = tuple((irreducible + shift, *rest) for shift in (-0.01, 0.0, 0.01))
    parametric = ParametricFit("loss_avg", irreducible, *rest, a * b / (a + b), draws, 300, 0.9991)
    seeds = (SeedNoise(first[0].size, "loss_avg", (6.1, 6.102, 6.101), 0.00016),)
    sizes = tuple(run.size for run in first)
    return StudyFit(tuple(laws), frontiers, (parametric,), seeds, "exact", "total", sizes, ("A note of the fit.",))


def planted_study(runs: Sequence[TrainedSize], **facts: Any) -> Study:
    """The runs as if they had been read, with training losses a little below those of validation."""
    return Study(tuple(MeasuredRun(run, train_config(run), IMAGES, training_means(run)) for run in runs), **facts)


def training_means(run: TrainedSize) -> dict[str, float]:
    return {metric: run.final(metric) - 0.05 for metric in METRICS}


def train_config(run: TrainedSize) -> TrainConfig:
    return TrainConfig(run=run.name, tokenizer="tokenizer", model=VARConfig(run.depth), seed=run.seed, loop=LOOP)


def write_run(folder: Path, run: TrainedSize) -> Path:
    """The run folder that training would have left: its config, and its record with training steps between."""
    record = RunRecord(folder / run.name)
    (folder / run.name / "config.yaml").write_text(to_yaml(train_config(run)))
    lines = []
    for point, images in enumerate(run.images.tolist()):
        position = {"step": images // LOOP.global_batch, "samples_seen": images, "epoch": images / IMAGES}
        measured = {metric: float(run.metrics[metric][point]) for metric in METRICS}
        lines.append({"kind": "train"} | position | {metric: value - 0.05 for metric, value in measured.items()})
        lines.append({"kind": "validation"} | position | measured)
    record.write(lines)
    return folder / run.name


def study_config(folder: Path, runs: Sequence[TrainedSize], **settings: Any) -> StudyConfig:
    """The config of a study that has these runs, and few draws."""
    names = list(dict.fromkeys(f"d{run.depth}" for run in runs))
    seeds = tuple(sorted({run.seed for run in runs}))
    repeated = tuple(name for name in names if sum(f"d{run.depth}" == name for run in runs) > 1)
    defaults = {"seeds": seeds, "repeated": repeated, "fit": FitConfig(draws=100)}
    sizes = tuple(f"configs/{name}.yaml" for name in names)
    return StudyConfig(folder=str(folder), sizes=sizes, **(defaults | settings))
