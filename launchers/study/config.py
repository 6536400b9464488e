"""The config of a scaling study: one file for all verbs of launchers/scaling_study.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.setup.config_files import parse_yaml
from training.laws.study_fit import FitConfig
from training.tracking.record import TrackingConfig

STUDY = "study.yaml"  # in the study's folder: its resolved config


@dataclass(frozen=True)
class PlanConfig:
    """The question of `plan`: what to train with a given compute."""

    pflop: float = 0.0  # the budget, in PFLOP (1e15 operations) of exact training FLOPs; 0: none is given
    gpu_days: float = 0.0  # or in days of one GPU, with the two numbers below
    gpu_tflops: float = 989.0  # peak of one GPU in 1e12 operations per second: an H100 in bf16, dense
    utilisation: float = 0.4  # share of the peak that training reaches (MFU)
    depths: tuple[int, ...] = ()  # the sizes to choose from; empty: every depth from 1 to 40


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """launchers/scaling_study.py: several sizes trained, fitted and reported as one study."""

    folder: str  # of the study: one run folder a size and seed, fit.json, report.md, the figures
    sizes: tuple[str, ...]  # configs of launchers/train.py, one a size; a file's name without .yaml is the size's
    seeds: tuple[int, ...] = (0,)  # the first is that of every size, the others of those in repeated
    repeated: tuple[str, ...] = ()  # names of the sizes that are trained with every seed
    settings: tuple[str, ...] = ()  # a.b=c, for all runs, on top of their configs
    start: tuple[str, ...] = ("deepspeed",)  # the command before launchers/train.py; `python` trains on one process
    attempts: int = 3  # starts of a run without a new checkpoint between, before it is left as failed
    slurm: bool = False  # write and submit job scripts instead of training here
    sbatch: tuple[str, ...] = ()  # options of sbatch for all sizes, such as --nodes=8, or for some, `d30: --nodes=16`
    known_entropy: str = ""  # source.json of synthetic data, whose irreducible losses are known
    fit: FitConfig = field(default_factory=FitConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def names(self) -> dict[str, str]:
        """Return the configs of the sizes by their names."""
        return {Path(size).stem: size for size in self.sizes}

    def run_names(self) -> list[tuple[str, int]]:
        """Return the size and seed of every run in order: all sizes with the first seed, then the repeated ones."""
        first = [(size, seed) for seed in self.seeds[:1] for size in self.names()]
        return first + [(size, seed) for seed in self.seeds[1:] for size in self.names() if size in self.repeated]


def study_name(config: StudyConfig) -> str:
    """Return what a study is called where several are shown: the name of its folder."""
    return Path(config.folder).resolve().name


def as_setting(name: str, value: Any) -> str:
    """Write name=value so that it is read back as that value."""
    if not isinstance(value, str):
        return f"{name}={json.dumps(value)}"
    try:
        is_itself = parse_yaml(value, name) == value
    except ValueError:
        is_itself = False
    return f"{name}={value if is_itself else json.dumps(value)}"
