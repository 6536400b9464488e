"""Images from a trained run: samples.npz and a picture of them.

`python launchers/sample.py run=runs/d16 per_class=2 classes=[207,980] cfg=4`
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from launchers.assembly import load_tokenizer, load_var  # noqa: E402
from launchers.command_line import Command, load_config, run_launcher, say  # noqa: E402
from launchers.config import SampleConfig, TrainConfig  # noqa: E402
from launchers.pictures import save_grid, to_uint8  # noqa: E402
from models.generation import generate  # noqa: E402
from models.var import VAR  # noqa: E402
from models.vqvae import VQVAE  # noqa: E402
from training.checkpoint import latest_checkpoint, read_manifest  # noqa: E402
from training.distributed import World  # noqa: E402

MAX_PER_CLASS = 2**16
MAX_COLUMNS, MAX_ROWS = 20, 50  # of the picture


def launch(command: Command[SampleConfig]) -> None:
    config = command.config
    if World.from_environment().world_size > 1:
        raise ValueError("sample.py runs on one process so far; start it with `python launchers/sample.py`")
    var = load_var(config.run)
    refuse_unusable(config, var.config.num_classes)
    labels = sample_labels(config, var.config.num_classes)
    out = Path(config.out or Path(config.run) / "samples")
    if command.dry_run:
        say(f"would write {len(labels)} images to {out}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, sha256 = load_tokenizer(config.tokenizer or tokenizer_of(config.run))
    refuse_other_tokenizer(config.run, sha256)
    images = np.concatenate(list(sample_batches(var.to(device), tokenizer.to(device), labels, config)))
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", arr_0=images, labels=labels)
    columns, rows = min(config.per_class, MAX_COLUMNS), MAX_ROWS
    shown = np.flatnonzero(np.arange(len(images)) % config.per_class < columns)[: rows * columns]
    save_grid(images[shown], out / "samples.png", columns=columns)
    say(f"wrote {len(images)} images to {out}/samples.npz and {out}/samples.png")


def tokenizer_of(run: str) -> str:
    """The tokenizer that the run's own config names."""
    recorded = Path(run) / "config.yaml"
    if not recorded.is_file():
        raise FileNotFoundError(f"{run}: no config.yaml that names its tokenizer; add tokenizer=PATH")
    return load_config(TrainConfig, str(recorded)).tokenizer


def refuse_other_tokenizer(run: str, sha256: str) -> None:
    """Raise ValueError if the run's checkpoint says that it was trained with another tokenizer."""
    newest = latest_checkpoint(Path(run) / "checkpoints")
    trained_with = read_manifest(newest)["identity"].get("tokenizer_sha256", sha256) if newest else sha256
    if trained_with != sha256:
        raise ValueError(
            f"{run}: was trained with tokenizer {trained_with[:12]}, this one is {sha256[:12]}; "
            "name the right one with tokenizer=PATH, or train the transformer again"
        )


def refuse_unusable(config: SampleConfig, num_classes: int) -> None:
    """Raise ValueError for settings outside their range."""
    last_seed = 2**32 // (num_classes * MAX_PER_CLASS) - 1  # torch's CPU generators keep 32 bits of a seed
    limits = {"per_class": (1, MAX_PER_CLASS), "batch": (1, 2**20), "seed": (0, last_seed)}
    for name, (least, most) in limits.items():
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"{name} is {getattr(config, name)}; accepted: {least} to {most}")


def sample_labels(config: SampleConfig, num_classes: int) -> np.ndarray:
    """`per_class` times every class asked for, class by class. Raises ValueError for a class that does not exist."""
    classes = config.classes or tuple(range(num_classes))
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"classes has {label}; this model knows 0 to {num_classes - 1}")
    return np.repeat(np.asarray(classes, np.int64), config.per_class)


def image_seeds(seed: int, labels: np.ndarray, numbers: np.ndarray, num_classes: int) -> np.ndarray:
    """A seed of its own for every (seed, class, number)."""
    return (seed * num_classes + labels) * MAX_PER_CLASS + numbers


def sample_batches(var: VAR, tokenizer: VQVAE, labels: np.ndarray, config: SampleConfig) -> Iterator[np.ndarray]:
    """Images (n, H, W, 3) uint8 in batches of `batch`. The seed of an image depends on its class and number alone."""
    device = var.position_embedding.device
    numbers = np.arange(len(labels)) % config.per_class
    seeds = image_seeds(config.seed, labels, numbers, var.config.num_classes)
    for start in range(0, len(labels), config.batch):
        part = slice(start, start + config.batch)
        codes = generate(
            var,
            tokenizer,
            torch.from_numpy(labels[part]).to(device),
            cfg=config.cfg,
            top_k=config.top_k,
            top_p=config.top_p,
            seeds=seeds[part].tolist(),
        )
        yield to_uint8(tokenizer.decode(codes))


def main() -> None:
    run_launcher(SampleConfig, launch, __doc__)


if __name__ == "__main__":
    main()
