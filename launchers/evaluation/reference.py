"""`evaluate.py reference`: the moments and features of real images, which generated ones are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, say
from launchers.evaluation.extraction import compute_units, ranks
from launchers.evaluation.images import NpzImages, open_image_set
from launchers.evaluation.tokenizer import through
from launchers.setup.loading import load_tokenizer
from launchers.setup.settings import refuse_unknown
from training.evaluation.extractors import EXTRACTORS, Features, load_extractor
from training.evaluation.gaussians import Gaussian
from training.evaluation.reference import Reference, ReferenceSums

import numpy as np


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The settings of `evaluate.py reference`."""

    images: str  # image shards, a folder of pictures, or an npz file; OpenAI's npz keeps its own moments
    out: str  # the file to write, FILE.npz
    side: int = 0  # in pixels, of the views of image shards
    resize_ratio: float = 1.0  # shards: a view is the middle of a picture whose short side is resize_ratio x side
    tokenizer: str = ""  # a tokenizer through which the images go first, to judge a transformer apart from it
    extractor: str = "lite0"  # or inception or torchscript, both from a file of weights
    weights: str = ""

    def __post_init__(self) -> None:
        refuse_unknown(EXTRACTORS, extractor=self.extractor)
        if not self.out.endswith(".npz"):
            raise ValueError(f"out is {self.out}; the name of a reference ends with .npz")


def launch_reference(command: Command[ReferenceConfig]) -> None:
    """Make a reference, on any number of ranks."""
    config = command.config
    images = open_image_set(config.images, config.side, config.resize_ratio)
    if config.side not in (0, images.side):
        raise ValueError(f"{config.images}: holds images of {images.side} pixels, side is {config.side}; leave it out")
    tokenizer, sha256 = load_tokenizer(config.tokenizer) if config.tokenizer else (None, "")
    if command.dry_run:
        say(f"would take the features of {images.count:,} images of {images.side} pixels into {config.out}")
        return
    with ranks() as world:
        extractor = load_extractor(config.extractor, config.weights, world.device)
        sums = ReferenceSums(images.count)
        if tokenizer:
            tokenizer.to(world.device)

        def see(pixels: np.ndarray) -> dict[str, Any]:
            return extractor.extract(through(tokenizer, pixels)[1] if tokenizer else pixels).tables()

        for unit in compute_units(images, see, Path(f"{config.out}.parts"), world):
            sums.add(Features(**unit))
        if world.is_rank_zero:
            description = {
                "images": images.identity,
                "count": images.count,
                "side": images.side,
                "tokenizer_sha256": sha256,
                "extractor": extractor.name,
                "extractor_sha256": extractor.sha256,
            }
            reference = sums.reference(description)
            if isinstance(images, NpzImages) and extractor.name == "inception":
                reference = with_printed_moments(reference, images.path)
            reference.save(Path(config.out))
            say(f"reference of {images.count:,} images in {config.out}")


def with_printed_moments(reference: Reference, path: Path) -> Reference:
    """Replace the moments by those that OpenAI's reference files carry of a larger set, if this is one."""
    with np.load(path, allow_pickle=False) as found:
        if "mu" not in found.files:
            return reference
        count = reference.gaussian.count
        gaussian = Gaussian(found["mu"], found["sigma"], count)
        spatial = Gaussian(found["mu_s"], found["sigma_s"], count) if "mu_s" in found.files else reference.spatial
    say(f"the moments are those that {path} carries; precision and recall use its {count:,} images")
    return Reference(gaussian, spatial, reference.features, {**reference.description, "moments": "of the file"})
