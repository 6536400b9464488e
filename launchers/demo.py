"""Run the whole pipeline on handwritten digits: pack, train, encode, train, sample, and report.

`make demo`, or `python launchers/demo.py`. Every stage is a command as a user would type it. A stage that is done is
not done again, so a demo that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launchers.setup.command_line import Command, run_launcher, say
from data_pipeline.files.atomic import atomic_file
from data_pipeline.shards.index import Index, is_complete
from launchers.sampling.pictures import save_grid, to_uint8
from launchers.setup.assembly import Models, load_models, load_tokenizer, open_images
from launchers.setup.config_files import load_config
from launchers.setup.settings import TrainConfig
from launchers.train_tokenizer import TokenizerConfig
from models.editing import box_in_tokens
from models.generation import edit, known_part
from training.checkpoints.commit import latest_checkpoint, read_manifest
from training.engine.distributed import World
from training.tracking.record import absolute_uri

import numpy as np
import torch
from PIL import Image
from torch import Tensor

LAUNCHERS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class DemoConfig:
    """The settings of the demo."""

    out: str = "runs/digits"
    data: str = "data/digits"
    tokenizer: str = "configs/digits/tokenizer.yaml"
    transformer: str = "configs/digits/d4.yaml"
    processes: int = 2  # that train the transformer; no more than there are GPUs, where there are any
    views: int = 8  # random crops of each training digit
    per_class: int = 100
    completed: int = 200  # held-out digits whose right halves are drawn from the left ones and the class
    cfg: float = 1.25
    top_k: int = 0
    top_p: float = 0.98


def launch(command: Command[DemoConfig]) -> None:
    """Run the stages one after another, judge the images, write the report."""
    config = command.config
    stages = plan_stages(config)
    if command.dry_run:
        for name, line in stages.items():
            say(f"{name}: {' '.join(line)}")
        return
    if (fit := processes_that_fit(config)) < config.processes:
        say(f"{fit} instead of processes={config.processes}: each needs a GPU of its own")
    seconds: dict[str, float] = {}
    for name, line in stages.items():
        if name == "encode_codes":
            forget_stale(config)
        if name == "sample":  # seconds of work; whatever is there may be of an earlier transformer or other settings
            shutil.rmtree(generated_folder(config), ignore_errors=True)
        seconds[name] = run_command(name, line)
    started = time.monotonic()
    report = judge(config)
    seconds["report"] = time.monotonic() - started
    report |= {"seconds": {name: round(value, 1) for name, value in seconds.items()}}
    path = Path(config.out) / "report.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    tell(config, report, path)


def plan_stages(config: DemoConfig) -> dict[str, list[str]]:
    """List the commands in order, by the name of their stage."""
    data, tokenizer = Path(config.data), load_config(TokenizerConfig, config.tokenizer)
    run = load_config(TrainConfig, config.transformer).run
    python = [sys.executable, "-u"]
    deepspeed = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes_that_fit(config))]
    return {
        "pack_images": [
            *[*python, str(LAUNCHERS / "pack_images.py")],
            *["source=digits", f"out={data}/images", "val_fraction=0.2"],
        ],
        "train_tokenizer": [*python, str(LAUNCHERS / "train_tokenizer.py"), "--config", config.tokenizer],
        "encode_codes": [
            *[*python, str(LAUNCHERS / "encode_codes.py"), f"tokenizer={tokenizer.run}"],
            *[f"images={data}/images", f"out={data}/codes", f"views={config.views}"],
        ],
        "train": [*deepspeed, str(LAUNCHERS / "train.py"), "--config", config.transformer],
        "sample": [
            # one process: starting two takes longer than these images do
            *[*python, str(LAUNCHERS / "sample.py"), f"run={run}", f"out={generated_folder(config)}"],
            *["format=npz", "batch=250", f"per_class={config.per_class}"],
            *[f"cfg={config.cfg}", f"top_k={config.top_k}", f"top_p={config.top_p}"],
            f"tracking_uri={load_config(TrainConfig, config.transformer).tracking.uri}",
        ],
    }


def processes_that_fit(config: DemoConfig) -> int:
    """Allow one process a GPU, since NCCL refuses two; on the CPU as many as are asked for."""
    on_gpus = World.from_environment().device.type == "cuda"
    return min(config.processes, torch.cuda.device_count()) if on_gpus else config.processes


def generated_folder(config: DemoConfig) -> Path:
    """Return where the demo's sampling goes."""
    return Path(config.out) / "generated"


def read_generated(config: DemoConfig) -> tuple[np.ndarray, np.ndarray]:
    """Read the generated images (N, H, W, 3) uint8 and their labels (N,), sorted by class; the file is shuffled."""
    with np.load(generated_folder(config) / "samples.npz") as found:
        images, labels = found["arr_0"], found["labels"]
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


def run_command(name: str, line: list[str]) -> float:
    """Run one stage, its output going to ours, and return the seconds it took.

    Raises:
        ValueError: it ended with another exit code than 0.
    """
    say(f"\n=== {name}: {' '.join(line)}")
    started = time.monotonic()
    code = subprocess.run(line).returncode
    if code != 0:
        raise ValueError(f"stage {name} ended with exit code {code}; its messages are above")
    return time.monotonic() - started


def forget_stale(config: DemoConfig) -> None:
    """Delete the demo's own codes and transformer if their tokenizer has since been trained anew."""
    _, sha256 = load_tokenizer(load_config(TokenizerConfig, config.tokenizer).run)
    run = Path(load_config(TrainConfig, config.transformer).run)
    newest = latest_checkpoint(run / "checkpoints")
    if newest and read_manifest(newest)["identity"]["tokenizer_sha256"] != sha256:
        shutil.rmtree(run)
    codes = Path(config.data) / "codes"
    for split in ("train", "val"):
        if is_complete(codes / split) and Index.read(codes / split).meta["tokenizer_sha256"] != sha256:
            shutil.rmtree(codes / split)


def judge(config: DemoConfig) -> dict[str, object]:
    """Measure how well a classifier of real digits recognises reconstructed and generated ones, and how much they vary.

    All digits are seen through the tokenizer's centre view. The classifier is scikit-learn's SVC with its defaults.
    """
    from sklearn.svm import SVC

    settings = load_config(TokenizerConfig, config.tokenizer)
    models = load_models(load_config(TrainConfig, config.transformer).run)
    tokenizer = models.tokenizer
    real = {}
    for split in ("train", "val"):
        folder = f"{config.data}/images/{split}"
        images = open_images(folder, tokenizer.config, settings.data, seed=0, random_views=False)
        real[split] = images.read(np.arange(len(images)), np.zeros(len(images), np.int64))
    held_out, held_out_labels = real["val"]
    reconstructed = tokenizer.decode(tokenizer.encode(held_out))
    generated, labels = read_generated(config)
    classifier = SVC().fit(_pixels(to_uint8(real["train"][0])), real["train"][1].numpy())

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        return round(float(classifier.score(_pixels(images), labels)), 4)

    to_complete, true_labels = held_out[: config.completed], held_out_labels[: config.completed]
    completed, unchanged = complete_right_halves(models, to_complete, true_labels)
    save_pictures(config, generated, held_out, reconstructed, completed)
    real_variance = within_class_variance(to_uint8(real["train"][0]), real["train"][1].numpy())
    return {
        "accuracy": {
            "real": accuracy(to_uint8(held_out), held_out_labels.numpy()),
            "reconstructed": accuracy(to_uint8(reconstructed), held_out_labels.numpy()),
            "generated": accuracy(generated, labels),
            "completed": accuracy(to_uint8(completed), true_labels.numpy()),
        },
        "kept_codes_unchanged": unchanged,
        "variance_ratio": round(within_class_variance(generated, labels) / real_variance, 4),
        "generated": len(labels),
        "sampling": {"cfg": config.cfg, "top_k": config.top_k, "top_p": config.top_p},
    }


def _pixels(images: np.ndarray) -> np.ndarray:
    """Turn images (N, H, W, 3) uint8 into grey values (N, H W) in [0, 1]."""
    return images.mean(3).reshape(len(images), -1) / 255


def within_class_variance(images: np.ndarray, labels: np.ndarray) -> float:
    """Compute the variance around the class's mean image, summed over pixels, averaged over classes."""
    pixels = _pixels(images)
    return float(np.mean([pixels[labels == label].var(0).sum() for label in np.unique(labels)]))


def complete_right_halves(models: Models, images: Tensor, labels: Tensor) -> tuple[Tensor, bool]:
    """Draw the right half of images (N, 3, H, W) anew as their class, and tell whether the left half's codes stayed."""
    side = models.var.scales.side
    keep_mask = box_in_tokens((0.0, 0.0, 1.0, 0.5), side)
    codes = edit(models.var, models.tokenizer, images, keep_mask, labels, seeds=range(len(images)))
    known = known_part(models.tokenizer, images, keep_mask, keep_coarsest=True)
    return models.tokenizer.decode(codes), torch.equal(codes[known.mask], known.codes[known.mask])


def save_pictures(
    config: DemoConfig, generated: np.ndarray, held_out: Tensor, reconstructed: Tensor, completed: Tensor
) -> None:
    """Write the demo's pictures.

    samples.png has the ten classes in rows. reconstructions.png has real digits above what the codes keep of them.
    completions.png has real digits, their left halves, and what was drawn in place of the right ones. digit.png is one
    digit, to try launchers/edit.py on.
    """
    out = Path(config.out)
    shown = np.arange(len(generated)) % config.per_class < 20
    save_grid(generated[shown], out / "samples.png", columns=min(20, config.per_class))
    save_grid(to_uint8(torch.cat([held_out[:20], reconstructed[:20]])), out / "reconstructions.png", columns=20)
    left_halves = held_out[:20].clone()
    left_halves[..., held_out.shape[-1] // 2 :] = 0  # grey
    save_grid(to_uint8(torch.cat([held_out[:20], left_halves, completed[:20]])), out / "completions.png", columns=20)
    with atomic_file(out / "digit.png") as file:
        Image.fromarray(to_uint8(held_out[:1])[0]).save(file, format="PNG")


def tell(config: DemoConfig, report: dict[str, object], path: Path) -> None:
    """Print the report, and where to look at pictures and curves."""
    settings = load_config(TrainConfig, config.transformer)
    say(f"\n{json.dumps(report, indent=1)}\n")
    names = ("samples", "reconstructions", "completions")
    say(f"pictures   {'  '.join(f'{config.out}/{name}.png' for name in names)}")
    say(f"report     {path}")
    state = Path(settings.run) / "mlflow.json"
    if experiment := (json.loads(state.read_text()) if state.exists() else {}).get("experiment_id"):
        mlflow = Path(sys.executable).with_name("mlflow")
        say(f"curves     {mlflow} ui --backend-store-uri {absolute_uri(settings.tracking.uri)} --port 5000")
        say(f"           then open http://127.0.0.1:5000/#/experiments/{experiment}/runs?compareRunsMode=CHART")


def main() -> None:
    run_launcher(DemoConfig, launch, __doc__)


if __name__ == "__main__":
    main()
