"""The paper's Fig. 9: which tokens of a tokenizer's encoder depend on which, with a number for how much both ways.

`python launchers/plot_dependencies.py --tokenizer runs/tokenizer --images data/imagenet256/images/val --out fig9.png`

Beside the picture goes a JSON file with the numbers; training/dependency.py says how they are to be read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data_pipeline.files import atomic_file  # noqa: E402
from launchers.assembly import open_images  # noqa: E402
from launchers.command_line import Command, run_launcher, say  # noqa: E402
from launchers.config import DependencyConfig  # noqa: E402
from launchers.data_config import DataConfig  # noqa: E402
from launchers.figures import AttentionMap, draw_attention  # noqa: E402
from launchers.loading import load_tokenizer, refuse_several_ranks  # noqa: E402
from launchers.pictures import to_uint8  # noqa: E402
from training.dependency import bidirectionality, later_share  # noqa: E402
from training.distributed import World  # noqa: E402
from training.mlflow_tracker import log_picture  # noqa: E402


def launch(command: Command[DependencyConfig]) -> None:
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
    if config.mlflow:
        log_picture(config.tokenizer, out)
    say(f"mean bidirectionality {report['mean_bidirectionality']:.4f} of {len(ids)} images; {out}")


def choose(number: int, config: DependencyConfig) -> np.ndarray:
    """Which images are looked at: a choice without repetition, a function of the seed."""
    if number < config.num_images:
        raise ValueError(f"num_images is {config.num_images}; {config.images} has {number}")
    return np.random.default_rng(config.seed).choice(number, config.num_images, replace=False)


def measure(attention: Tensor) -> dict[str, Any]:
    """Attention (B, n, n) -> the numbers of every image, in order, and their mean."""
    both_ways = bidirectionality(attention)
    return {
        "bidirectionality": both_ways.tolist(),
        "later_share": later_share(attention).tolist(),
        "mean_bidirectionality": both_ways.mean().item(),
    }


def draw(path: Path, images: Tensor, attention: Tensor, report: dict[str, Any]) -> None:
    maps = [
        AttentionMap(photograph, weights, f"bidirectionality {both_ways:.2f}")
        for photograph, weights, both_ways in zip(to_uint8(images), attention.numpy(), report["bidirectionality"])
    ]
    draw_attention(path, maps, title=f"Token dependency · mean bidirectionality {report['mean_bidirectionality']:.2f}")


def main() -> None:
    run_launcher(DependencyConfig, launch, __doc__)


if __name__ == "__main__":
    main()
