"""Draw the paper's Fig. 7: images of several model sizes (rows) at several stages of their training (columns).

`python launchers/compare_sizes.py --runs runs/d16 runs/d20 runs/d24 runs/d30 --stages 0.2 0.6 1.0 --out fig7.png`

All cells share their seeds, and their first scales are those of a real image of each class, so that the content is the
same. A stage is a share of the run's training tokens; `loop.keep_at` makes a run keep the checkpoints this needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from data_pipeline.loading.loader import first_of_classes
from launchers.figures.plots import Cell, draw_table
from launchers.sampling.pictures import tile
from launchers.sampling.plan import MAX_CLASSES, plan_samples
from launchers.sampling.sampler import decode_in_parts
from launchers.setup.assembly import Models, load_models, open_codes_or_images
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig, refuse_below_zero, refuse_no_png
from models.generation import KnownTokens, generate_scales
from models.sampling import Sampling
from models.var import VARConfig
from training.checkpoints.commit import committed_checkpoints, read_manifest
from training.checkpoints.model_on_disk import ModelOnDisk
from training.engine.distributed import World
from training.tracking.mlflow import log_picture
from training.tracking.record import RunRecord

import numpy as np
import torch

PAPER_CLASSES = (130, 270, 88, 284, 688, 250, 146, 980, 484)  # the caption of Fig. 7


@dataclass(frozen=True, kw_only=True)
class CompareSizesConfig:
    """The settings of a comparison of model sizes."""

    runs: tuple[str, ...]  # run folders, one row each; an imported, exported or public model has the last stage alone
    stages: tuple[float, ...] = (0.2, 0.6, 1.0)  # shares of a run's training tokens, one column each
    tolerance: float = 0.05  # how far a checkpoint may lie from its stage
    classes: tuple[int, ...] = ()  # one image each; empty: the paper's nine for 1000 classes, else the first nine
    out: str  # the PNG to write
    tokenizer: str = ""  # empty: the one the runs were trained with
    patch_nums: tuple[int, ...] = ()  # for public files with a schedule of their own
    tracking_uri: str = ""  # of the tracker whose page of the first run gets it; empty: none, whatever the folder names
    data: str = ""  # validation shards to force tokens from; empty: those of the first run's config.yaml
    forced_scales: int = 1  # how many scales are those of a real image of the class; 0: none
    cfg: float = 1.5
    top_k: int = 900  # 0: off
    top_p: float = 0.96  # 1: off
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("runs", "stages"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it needs at least one")
        for stage in self.stages:
            if not 0 < stage <= 1:
                raise ValueError(f"stages has {stage}; it holds shares of the training, above 0 and up to 1")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it is a share of the training, from 0 to below 1")
        refuse_below_zero(forced_scales=self.forced_scales)
        refuse_no_png(self.out)


@dataclass(frozen=True)
class Snapshot:
    """A model at a stage of its training, and the line below its cell."""

    path: Path
    note: str


def launch(command: Command[CompareSizesConfig]) -> None:
    """Find the checkpoint for every cell, draw the cells, write the figure."""
    config = command.config
    refuse_several_ranks("compare_sizes.py")
    snapshots = [[find_snapshot(Path(run), stage, config.tolerance) for stage in config.stages] for run in config.runs]
    if command.dry_run:
        say("\n".join(f"{snapshot.path}: {snapshot.note}" for row in snapshots for snapshot in row))
        return
    first = load_models(str(snapshots[0][0].path), config.tokenizer, config.patch_nums)
    config = replace(config, classes=config.classes or default_classes(first.var.config))
    known = force_scales(first, config)
    rows, names = [], []
    for row in snapshots:
        cells = []
        for snapshot in row:
            models = load_models(str(snapshot.path), config.tokenizer, config.patch_nums)
            refuse_other_tokenizer(models, first, snapshot)
            cells.append(Cell(draw_images(models, known, config), snapshot.note))
            say(f"drew {snapshot.path}, {snapshot.note}")
        rows.append(cells)
        names.append(f"d{models.var.config.depth}, {models.var.config.num_parameters / 1e6:,.1f}M parameters")
    out = Path(config.out)
    draw_table(out, rows, rows=names, columns=[f"{stage:.0%} of training tokens" for stage in config.stages])
    log_picture(config.runs[0], out, config.tracking_uri)
    say(f"wrote {out}")


def find_snapshot(run: Path, stage: float, tolerance: float) -> Snapshot:
    """Find the committed checkpoint nearest to a stage; a model without checkpoints is at the end of its training.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: no checkpoint is near enough, or `run` is itself one.
    """
    shares = trained_shares(run)
    nearest = min(shares, key=lambda path: abs(shares[path] - stage))
    if abs(shares[nearest] - stage) > tolerance:
        if nearest == run:
            raise ValueError(f"{run}: is a model without stages; compare it with --stages 1.0")
        there = ", ".join(f"{share:.3f}" for share in sorted(shares.values()))
        raise ValueError(
            f"{run}: no checkpoint within {tolerance} of stage {stage}, only at {there}; train with loop.keep_at "
            f"that has {stage}, choose other stages, or raise tolerance"
        )
    if nearest == run:
        return Snapshot(run, "end of training")
    return Snapshot(nearest, f"{shares[nearest]:.1%} · step {read_manifest(nearest)['step']:,}")


def trained_shares(run: Path) -> dict[Path, float]:
    """Map the models of a run to the share of the run's training tokens that each has seen."""
    if (run / "manifest.json").is_file():
        raise ValueError(f"{run}: is one checkpoint; give its run folder, and the stage in stages")
    checkpoints = committed_checkpoints(run / "checkpoints")
    if not checkpoints:
        if not run.is_file():
            ModelOnDisk.find(str(run), "VAR")  # says what is wrong with it
        return {run: 1.0}
    total = total_samples(run)
    return {path: read_manifest(path)["samples_seen"] / total for path in checkpoints}


def total_samples(run: Path) -> int:
    """Compute how many samples the whole run sees, from its config and the first line of its record."""
    config = load_config(TrainConfig, str(run / "config.yaml"))
    first = next((record for record, _ in RunRecord(run).read_after() if record["kind"] == "train"), None)
    if first is None:
        raise ValueError(f"{run}/metrics.jsonl: has no training step, so the length of the run is unknown; restore it")
    num_samples = round(first["samples_seen"] / first["epoch"])
    return config.loop.total_steps(num_samples) * config.loop.global_batch


def default_classes(model: VARConfig) -> tuple[int, ...]:
    """Choose the paper's classes where the model may be of ImageNet, else the first nine."""
    return PAPER_CLASSES if model.num_classes == 1000 else tuple(range(min(9, max(model.num_classes, 1))))


def force_scales(models: Models, config: CompareSizesConfig) -> KnownTokens | None:
    """Encode the first validation image of each class, to force its first scales; None if none are forced."""
    scales = models.var.config.scales
    if config.forced_scales > scales.num_scales:
        raise ValueError(f"forced_scales is {config.forced_scales}; the models have {scales.num_scales} scales")
    if config.forced_scales == 0:
        return None
    train = training_config(models, config)
    folder = config.data or train.data.validation
    dataset = open_codes_or_images(
        folder,
        models.tokenizer.config,
        models.tokenizer_sha256,
        train.data,
        num_classes=train.model.num_classes,
        seed=train.seed,
        random_views=False,
    )
    ids = first_of_classes(dataset, config.classes)
    data, _ = dataset.read(ids, np.zeros_like(ids))
    codes = data if data.ndim == 2 else models.tokenizer.encode(data)
    is_forced = torch.arange(scales.num_tokens) < scales.slices[config.forced_scales - 1].stop
    return KnownTokens(codes, is_forced.expand(codes.shape))


def training_config(models: Models, config: CompareSizesConfig) -> TrainConfig:
    """Read how the first run was trained; of an imported model nothing is known but its own config."""
    recorded = Path(config.runs[0]) / "config.yaml"
    if recorded.is_file():
        return load_config(TrainConfig, str(recorded))
    if not config.data:
        raise ValueError(
            f"{config.runs[0]}: no config.yaml that names validation data; add --data FOLDER or --forced-scales 0"
        )
    return TrainConfig(run=config.runs[0], tokenizer=config.tokenizer, model=models.var.config)


def refuse_other_tokenizer(models: Models, first: Models, snapshot: Snapshot) -> None:
    """Raise ValueError if a model was trained with another tokenizer than the first: its codes mean something else."""
    if models.tokenizer_sha256 != first.tokenizer_sha256:
        raise ValueError(
            f"{snapshot.path}: was trained with tokenizer {models.tokenizer_sha256[:12]}, the first run with "
            f"{first.tokenizer_sha256[:12]}; compare runs of one tokenizer"
        )


def draw_images(models: Models, known: KnownTokens | None, config: CompareSizesConfig) -> np.ndarray:
    """Draw a square of one image per class, (H, W, 3) uint8."""
    device = World.from_environment().device
    var, tokenizer = models.var.to(device), models.tokenizer.to(device)
    tokenizer.prepare_decoder()
    is_conditional = var.config.num_classes > 0
    num_classes = var.config.num_classes or MAX_CLASSES  # an unconditional model takes its classes from forced tokens
    plan = plan_samples(config.classes, num_classes, per_class=1, batch=len(config.classes), seed=config.seed)
    images = plan.unit(0)
    labels = torch.from_numpy(plan.labels(images)) if is_conditional else torch.zeros(len(images), dtype=torch.int64)
    sampling = Sampling(cfg=config.cfg, top_k=config.top_k, top_p=config.top_p)
    if known is not None:
        known = KnownTokens(known.codes.to(device), known.mask.to(device))
    seeds = torch.from_numpy(plan.seeds(images))
    drawn = generate_scales(var, tokenizer, labels.to(device), sampling, seeds=seeds, known=known)
    pictures = decode_in_parts(tokenizer.decode, drawn.codes)
    return tile(pictures, columns=math.isqrt(len(pictures) - 1) + 1, gap=max(1, pictures.shape[1] // 64))


def main() -> None:
    run_launcher(CompareSizesConfig, launch, __doc__)


if __name__ == "__main__":
    main()
