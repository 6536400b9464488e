"""Draw the paper's Fig. 9: which tokens of a tokenizer's encoder depend on which, and how much both ways.

`python launchers/plot_dependencies.py --tokenizer runs/tokenizer --images data/imagenet256/images/val --out fig9.png`

Beside the picture goes a JSON file with the numbers; training/laws/dependency.py says how they are to be read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from data_pipeline.files.atomic import atomic_file
from launchers.figures.plots import AttentionMap, draw_attention
from launchers.sampling.pictures import to_uint8
from launchers.setup.assembly import open_images
from launchers.setup.loading import load_tokenizer
from launchers.setup.settings import DataConfig, ViewConfig, refuse_below_zero, refuse_no_png
from training.engine.distributed import World
from training.laws.dependency import bidirectionality, later_share
from training.tracking.mlflow import log_picture

import numpy as np
import torch
from torch import Tensor

MAX_DEPENDENCY_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class DependencyConfig:
    """The settings of a picture of token dependencies."""

    tokenizer: str
    images: str  # a folder of image shards
    num_images: int = 4
    out: str  # the PNG to write; the numbers go beside it as JSON
    views: ViewConfig = field(default_factory=ViewConfig)
    seed: int = 0  # of the choice of images
    tracking_uri: str = ""  # of the tracker whose page of the tokenizer gets it; empty: none, whatever the folder names

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= MAX_DEPENDENCY_IMAGES:
            raise ValueError(f"num_images is {self.num_images}; accepted: 1 to {MAX_DEPENDENCY_IMAGES}")
        refuse_below_zero(seed=self.seed)
        refuse_no_png(self.out)


def launch(command: Command[DependencyConfig]) -> None:
    """Measure the encoder's attention on some images; write the figure and its numbers."""
    config = command.config
    refuse_several_ranks("plot_dependencies.py")
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    data = DataConfig(views=config.views)
    dataset = open_images(config.images, tokenizer.config, data, seed=config.seed, random_views=False)
    ids = choose(len(dataset), config)
    if command.dry_run:
        say(f"would draw the attention of images {ids.tolist()} of {config.images} to {config.out}")
        return
    device = World.from_environment().device
    tokenizer.to(device)
    images = dataset.read(ids, np.zeros_like(ids))[0]
    attention = torch.cat([tokenizer.token_dependency(image[None].to(device)).cpu() for image in images])
    report = measure(attention) | {"images": config.images, "samples": ids.tolist(), "tokenizer_sha256": sha256}
    out = Path(config.out)
    draw(out, images, attention, report)
    with atomic_file(out.with_suffix(".json")) as file:
        file.write(json.dumps(report, indent=1).encode() + b"\n")
    log_picture(config.tokenizer, out, config.tracking_uri)
    say(f"mean bidirectionality {report['mean_bidirectionality']:.4f} of {len(ids)} images; {out}")


def choose(number: int, config: DependencyConfig) -> np.ndarray:
    """Choose the images to look at, without repetition; a function of the seed."""
    if number < config.num_images:
        raise ValueError(f"num_images is {config.num_images}; {config.images} has {number}")
    return np.random.default_rng(config.seed).choice(number, config.num_images, replace=False)


def measure(attention: Tensor) -> dict[str, Any]:
    """Compute the numbers of every image from its attention (B, n, n), and their mean."""
    both_ways = bidirectionality(attention)
    return {
        "bidirectionality": both_ways.tolist(),
        "later_share": later_share(attention).tolist(),
        "mean_bidirectionality": both_ways.mean().item(),
    }


def draw(path: Path, images: Tensor, attention: Tensor, report: dict[str, Any]) -> None:
    """Draw images (B, 3, H, W) beside their attention (B, n, n)."""
    maps = [
        AttentionMap(photograph, weights, f"bidirectionality {both_ways:.2f}")
        for photograph, weights, both_ways in zip(to_uint8(images), attention.numpy(), report["bidirectionality"])
    ]
    draw_attention(path, maps, title=f"Token dependency · mean bidirectionality {report['mean_bidirectionality']:.2f}")


def main() -> None:
    run_launcher(DependencyConfig, launch, __doc__)


if __name__ == "__main__":
    main()
