"""Draw images from a trained run or a public checkpoint: PNG files or the ADM evaluator's npz, and a grid of some.

`deepspeed launchers/sample.py --run runs/d16 --per-class 50 --format npz --cfg 1.5 --out samples/d16`
`python launchers/sample.py --run var_d16.pth --tokenizer vae_ch160v4096z32.pth --classes 207 --per-class 16 --cfg 4`

The images are split over the ranks. The same command, on any number of ranks, goes on where a killed one stopped.
A model without classes has nothing to guide towards: the default cfg means 0 there, and any other is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, run_launcher, say, say_nothing
from data_pipeline.files.atomic import file_sha256
from launchers.sampling.files import RECORD, SampleFiles, claim_folder, draw_grid, open_files
from launchers.sampling.plan import SamplePlan, plan_samples
from launchers.sampling.sampler import Sampler, draw_all, speed_up
from launchers.setup.assembly import Models, load_models
from launchers.setup.loading import refuse_file
from launchers.setup.settings import refuse_unknown
from models.sampling import Sampling
from models.var import VARConfig
from training.checkpoints.model_on_disk import ModelOnDisk
from training.engine.distributed import (
    World,
    agree_on_error,
    agree_on_value,
    join_world,
    leave_world,
    owned_by_rank_zero,
)
from training.engine.engine import PRECISIONS
from training.tracking.mlflow import log_picture

SAMPLE_FORMATS = ("png", "npz")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The settings of a sampling; the defaults are those that the released models' FID is measured with."""

    run: str  # a run folder, a checkpoint, an imported or exported model, or a public .pth file
    tokenizer: str = ""  # empty: the one the run was trained with
    patch_nums: tuple[int, ...] = ()  # for a public file with a schedule of its own
    out: str = ""  # folder; empty: RUN/samples, and samples/NAME for a file NAME.pth
    format: str = "png"  # one file per image; or "npz": one file of all for the ADM evaluator
    per_class: int = 10
    classes: tuple[int, ...] = ()  # empty: all
    cfg: float = 1.5  # guidance at the last scale, growing from 0 at the first; 0: off
    guidance: tuple[float, ...] = ()  # instead of cfg: the strength at every scale
    top_k: int = 900  # 0: off
    top_p: float = 0.96  # 1: off
    smooth: bool = False  # Gumbel-softmax smoothing: better to look at, worse to measure
    precision: str = "fp32"  # of the transformer, or bf16 (then also that of the decoder) or fp16
    compile: bool = False  # compile the transformer's steps, and a GPU's decoder: a slow start, for many images
    batch: int = 50  # images at once; memory limits it: in fp32 50 take 8 GiB of cache at d16, 29 at d30, 138 at 512 px
    seed: int = 0
    tracking_uri: str = ""  # of the tracker whose page of the run gets the grid; empty: none, whatever the folder names

    def __post_init__(self) -> None:
        refuse_unknown(SAMPLE_FORMATS, format=self.format)
        refuse_unknown(PRECISIONS, precision=self.precision)
        if self.smooth and self.format == "npz":
            raise ValueError("smooth is on and format is npz; smoothed images are never to be measured: use format=png")


def launch(command: Command[SampleConfig]) -> None:
    """Draw the images that a folder lacks, then its grid and last form."""
    config = command.config
    models = load_models(config.run, config.tokenizer, config.patch_nums)
    num_classes = models.var.config.num_classes
    plan = plan_samples(config.classes, num_classes, per_class=config.per_class, batch=config.batch, seed=config.seed)
    sampling = choose_sampling(config, models.var.config)
    folder = out_folder(config)
    refuse_file(folder)
    if command.dry_run:
        say(f"would draw {plan.num_images:,} images into {folder}, in {plan.num_units:,} batches of {plan.batch}")
        return
    world = World.from_environment()
    if world.world_size > 1:
        world = join_world()
    settings = what_defines_images(models, sampling, config, plan) if world.is_rank_zero else {}
    files = open_files(folder, plan, format=config.format)
    report = say if world.is_rank_zero else say_nothing
    with owned_by_rank_zero(folder, world):
        pending = claim(folder, settings, files, world)
        if not pending and files.is_finished():
            report(f"{folder} has all {plan.num_images:,} images; nothing to do")
        else:
            var, tokenizer = models.var.to(world.device), models.tokenizer.to(world.device)
            speed_up(var, tokenizer, config.precision, compiles=config.compile)
            draw_all(Sampler(var, tokenizer, sampling, plan), files, pending, world, report)
            if world.is_rank_zero:
                finish(folder, files, config)
    leave_world()


def choose_sampling(config: SampleConfig, model: VARConfig) -> Sampling:
    """Choose how tokens are drawn.

    Raises:
        ValueError: a setting outside its range, guidance of another number of scales, or guidance without classes.
    """
    cfg = config.cfg
    if model.num_classes == 0:
        if any(config.guidance):
            raise ValueError(f"guidance is {config.guidance}; an unconditional model has no class to guide towards")
        if cfg not in (0, SampleConfig.cfg):
            raise ValueError(f"cfg is {cfg}; an unconditional model has no class to guide towards, so leave cfg out")
        cfg = 0.0
    sampling = Sampling(cfg=cfg, guidance=config.guidance, top_k=config.top_k, top_p=config.top_p, smooth=config.smooth)
    sampling.schedule(model.scales.num_scales)  # refuses a wrong number of them before anything is drawn
    return sampling


def out_folder(config: SampleConfig) -> Path:
    """Choose where the images go: `out`, else a folder of the run, else samples/NAME for a file NAME.pth."""
    run = Path(config.run)
    return Path(config.out or (Path("samples") / run.stem if run.is_file() else run / "samples"))


def what_defines_images(models: Models, sampling: Sampling, config: SampleConfig, plan: SamplePlan) -> dict[str, Any]:
    """Collect what the images depend on and how they are stored: what must not change in a folder of them."""
    return {
        "var_sha256": var_sha256(config.run),
        "tokenizer_sha256": models.tokenizer_sha256,
        "guidance": sampling.guidance,
        **asdict(replace(sampling, cfg=0.0) if config.guidance else sampling),  # guidance replaces cfg
        "precision": config.precision,
        "compile": config.compile,
        "classes": config.classes,
        "per_class": plan.per_class,
        "seed": plan.seed,
        "batch": plan.batch,
        "format": config.format,
    }


def var_sha256(run: str) -> str:
    """Compute the identity of the transformer in a public file or a folder."""
    return file_sha256(Path(run)) if Path(run).is_file() else ModelOnDisk.find(run, "VAR").sha256()


def claim(folder: Path, settings: dict[str, Any], files: SampleFiles, world: World) -> list[int]:
    """Check that the folder is of rank 0's settings, and list the units still to be drawn. A collective.

    Raises:
        ValueError: it holds other images, or the ranks do not see the same folder.
    """
    error = None
    if world.is_rank_zero:
        try:
            claim_folder(folder, settings)
        except (OSError, ValueError) as problem:
            error = problem
    agree_on_error(error, world)
    pending = files.pending()
    record = (folder / RECORD).read_bytes() if (folder / RECORD).is_file() else b""
    seen = f"{RECORD} {hashlib.sha256(record).hexdigest()[:8]}, {len(pending)} batches to draw"
    agree_on_value(seen, str(folder), world)
    return pending


def finish(folder: Path, files: SampleFiles, config: SampleConfig) -> None:
    """Draw the grid, which MLflow gets too, and bring the files into their last form, once all images are there."""
    picture = draw_grid(files, folder)
    place = files.commit()
    say(f"{files.plan.num_images:,} images in {place}, some of them in {picture}")
    log_picture(config.run, picture, config.tracking_uri, group=folder.name)


def main() -> None:
    run_launcher(SampleConfig, launch, __doc__)


if __name__ == "__main__":
    main()
