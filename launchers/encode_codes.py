"""Encode image shards into code shards with a trained tokenizer: stage 2 then never sees an image.

`python launchers/encode_codes.py tokenizer=runs/tokenizer images=data/imagenet256/images out=data/imagenet256/codes`
Every process that is started so, by hand, `srun`, `torchrun` or `deepspeed`, now or later, on any machine that sees the
folders, takes the next shard that nobody works on. Killed ones are simply started again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.making.claims import forget_finished_work
from data_pipeline.making.encoding import Encoding, Recipe, is_encoded
from data_pipeline.shards.index import Index
from launchers.setup.assembly import image_transform, load_tokenizer
from launchers.setup.command_line import Command, run_launcher, say, say_nothing
from launchers.setup.settings import ViewConfig
from models.vqvae import VQVAE
from training.engine.distributed import World


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """The settings of an encoding of image shards into code shards, with a trained tokenizer."""

    tokenizer: str
    images: str
    out: str
    views: int = 16  # random crops a training image; validation images get one centre crop
    view: ViewConfig = field(default_factory=ViewConfig)
    batch: int = 64
    seed: int = 0


def launch(command: Command[EncodeConfig]) -> None:
    """Encode train and val, unless the same codes are there already."""
    config, world = command.config, World.from_environment()
    report = say if world.is_rank_zero else say_nothing  # of workers that one launcher has started
    if world.device.type == "cpu":  # the processes of one node share its cores
        torch.set_num_threads(max(1, min(torch.get_num_threads(), _num_cores() // world.local_world_size)))
    tokenizer, sha256 = load_tokenizer(config.tokenizer)
    tokenizer.to(world.device)
    under_way: dict[str, Encoding] = {}
    for split, views in (("train", config.views), ("val", 1)):
        images, out = f"{config.images}/{split}", Path(config.out) / split
        recipe = recipe_of(config, tokenizer, world.device, sha256=sha256, views=views)
        source = Index.read(images, kind="images")
        recipe.check_views(source)
        if is_encoded(out, recipe.meta(source)):
            forget_finished_work(out)
            report(f"{out} holds these images in codes of this tokenizer already; nothing to do")
        elif command.dry_run:
            say(f"would encode {source.num_samples} images x {views} views into {out}")
        else:
            encode = partial(encode_on, world.device, tokenizer)
            under_way[split] = Encoding(images, out, recipe, encode=encode, report=report)
    for encoding in under_way.values():  # first what is left to take of both splits, then what others may drop
        encoding.work()
    for split, encoding in under_way.items():
        report(f"{config.out}/{split}: complete, {encoding.finish().num_samples} images")


def recipe_of(config: EncodeConfig, tokenizer: VQVAE, device: torch.device, *, sha256: str, views: int) -> Recipe:
    """Return the recipe of a split by the settings and the tokenizer."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else ""
    return Recipe(
        transform=image_transform(tokenizer.config, config.view),
        views=views,
        seed=config.seed,
        patch_nums=tokenizer.config.patch_nums,
        vocab_size=tokenizer.config.quantizer.vocab_size,
        tokenizer_sha256=sha256,
        batch_size=config.batch,
        device=f"{device.type} {capability}".strip(),
    )


def encode_on(device: torch.device, tokenizer: VQVAE, images: Tensor) -> Tensor:
    """Encode images (B, 3, S, S) in [-1, 1] into codes (B, L) on a device."""
    return tokenizer.encode(images.to(device))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    """Run the launcher."""
    run_launcher(EncodeConfig, launch, __doc__)


if __name__ == "__main__":
    main()
