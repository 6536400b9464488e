"""Studies as they lie on disk, of losses that nobody has trained, to be shown in MLflow."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from launchers.setup.config_files import to_yaml
from launchers.setup.settings import DataConfig, TrainConfig
from launchers.study.config import STUDY, StudyConfig
from models.var import VARConfig
from training.accounting import FLOPS_PER_PFLOP
from training.flops import training_flops
from training.loop_config import LoopConfig
from training.tracking.record import Record, RunRecord, TrackingConfig

BATCH, STEPS, POINTS = 768, 1000, 12  # of each run
NUM_SAMPLES = BATCH * STEPS  # one epoch
DEPTHS = (6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 30)  # the paper's twelve


def write_study(
    folder: Path, uri: str, depths: tuple[int, ...] = DEPTHS, *, unfinished: tuple[int, ...] = ()
) -> StudyConfig:
    """A study's folder: study.yaml and a run folder a size, each with validation records at equal ratios of compute."""
    tracking = TrackingConfig(uri=uri, experiment="scaling", study=folder.name)
    sizes = tuple(f"configs/d{depth}.yaml" for depth in depths)
    config = StudyConfig(folder=str(folder), sizes=sizes, tracking=tracking)
    for depth in depths:
        write_run(folder / f"d{depth}-seed0", depth, tracking, last_step=STEPS // 2 if depth in unfinished else STEPS)
    (folder / STUDY).write_text(to_yaml(config))
    return config


def write_run(folder: Path, depth: int, tracking: TrackingConfig, *, last_step: int = STEPS) -> None:
    model = VARConfig(depth=depth)
    config = TrainConfig(
        run=str(folder),
        tokenizer="runs/tokenizer",
        model=model,
        data=DataConfig(train="data/train", validation="data/val"),
        loop=LoopConfig(global_batch=BATCH, epochs=1.0),
        tracking=tracking,
    )
    steps = sorted({round(step) for step in np.geomspace(STEPS * 1e-3, STEPS, POINTS)})
    record = RunRecord(folder)
    record.write([{"kind": "train"} | entry(model, step) for step in range(1, last_step + 1) if step % 100 == 1])
    record.write([{"kind": "validation"} | entry(model, step) for step in steps if step <= last_step])
    (folder / "config.yaml").write_text(to_yaml(config))


def entry(model: VARConfig, step: int) -> Record:
    """Return a record without its kind; its loss is L(N, D) = E + A N^-a + B D^-b with constants of no meaning."""
    pflop = step * BATCH * training_flops(model) / FLOPS_PER_PFLOP
    place = {"step": step, "samples_seen": step * BATCH, "epoch": step * BATCH / NUM_SAMPLES, "pflop": pflop}
    place["time"] = 1.7e9 + 60 * model.depth + step
    last = 4.2 + 0.5 * (model.num_parameters / 1e9) ** -0.25 + 0.12 * (step * BATCH / 1e6) ** -0.35
    losses = {"loss_last": last, "loss_avg": last + 0.7}
    return place | losses | {"error_last": 0.85 + last / 100, "error_avg": 0.8 + last / 100}
