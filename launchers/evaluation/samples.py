"""`evaluate.py samples`: how generated images compare with a reference."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, say
from data_pipeline.files.atomic import atomic_file, file_sha256
from data_pipeline.files.strict_json import read_json
from launchers.evaluation.extraction import compute_units, ranks
from launchers.evaluation.images import ImageSet, open_image_set
from launchers.sampling.files import RECORD
from launchers.setup.settings import refuse_below_zero, refuse_unknown
from training.evaluation.extractors import EXTRACTORS, Extractor, Features, load_extractor
from training.evaluation.measures import MODES, cautions, measure
from training.evaluation.reference import Reference
from training.tracking.mlflow import code_version

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """The settings of `evaluate.py samples`."""

    images: str  # the folder or samples.npz of sample.py, any npz with arr_0, a folder of pictures; or image shards
    reference: str  # the file that `evaluate.py reference` made
    out: str = ""  # the result; empty: evaluation-EXTRACTOR-MODE.json beside the images
    mode: str = "float64"  # the right answer; or "adm": OpenAI's evaluator, operation for operation
    count: int = 0  # refuse any other number of images, such as 50000; 0: take what is there
    extractor: str = "lite0"  # that of the reference
    weights: str = ""

    def __post_init__(self) -> None:
        refuse_unknown(EXTRACTORS, extractor=self.extractor)
        refuse_unknown(MODES, mode=self.mode)
        refuse_below_zero(count=self.count)


def launch_samples(command: Command[SamplesConfig]) -> None:
    """Measure a set of images, on any number of ranks, and write the result."""
    config = command.config
    reference = Reference.load(Path(config.reference))
    made_of = reference.description["images"]
    images = open_image_set(config.images, reference.description["side"], made_of.get("resize_ratio", 1.0))
    refuse_miscounted(images, config.count)
    out = Path(config.out) if config.out else default_out(config)
    with ranks() as world:
        extractor = load_extractor(config.extractor, config.weights, world.device)
        reference.check(extractor, images.side)
        if command.dry_run:
            say(f"would compare {images.count:,} images of {images.side} pixels with {config.reference}, into {out}")
            return
        found = compute_units(images, lambda some: extractor.extract(some).tables(), out.with_suffix(".parts"), world)
        parts = [Features(**unit) for unit in found]
        if not world.is_rank_zero:
            return
        features = Features.join(parts)
        measures = measure(features, reference, mode=config.mode, device=world.device)
        result = {
            "measures": measures,
            "cautions": cautions(features, reference, measures),
            **what_defines(images, extractor, reference, config),
        }
    with atomic_file(out) as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())
    tell(result, out)


def refuse_miscounted(images: ImageSet, count: int) -> None:
    """Check that there are as many images as asked for, and equally many of every class.

    Raises:
        ValueError: there are not; with the classes that differ.
    """
    if count and images.count != count:
        raise ValueError(f"{images.count:,} images, count is {count:,}; draw the others, or set count={images.count}")
    if images.labels is None:
        return
    classes, counts = np.unique(images.labels, return_counts=True)
    usual = int(np.median(counts))
    if (counts != usual).any():
        odd = int(np.flatnonzero(counts != usual)[0])
        raise ValueError(
            f"class {classes[odd]} has {counts[odd]} images, most have {usual}; draw equally many of each class"
        )


def default_out(config: SamplesConfig) -> Path:
    """Choose where the result goes: beside the images."""
    place = Path(config.images)
    return (place if place.is_dir() else place.parent) / f"evaluation-{config.extractor}-{config.mode}.json"


def what_defines(images: ImageSet, extractor: Extractor, reference: Reference, config: SamplesConfig) -> dict[str, Any]:
    """Collect all that the measures depend on, for the result."""
    place = Path(config.images)
    record = (place if place.is_dir() else place.parent) / RECORD
    classes = {} if images.labels is None else {"classes": len(np.unique(images.labels))}
    return {
        "mode": config.mode,
        "images": {"count": images.count, "side": images.side, **classes, **images.identity},
        "sampling": read_json(record) if record.is_file() else None,
        "extractor": {"name": extractor.name, "sha256": extractor.sha256},
        "reference": {"sha256": file_sha256(Path(config.reference)), **reference.description},
        "code": code_version(),
    }


def tell(result: dict[str, Any], out: Path) -> None:
    """Print the measures, named by their extractor, and where the result is."""
    name = result["extractor"]["name"]
    for measure_name, value in result["measures"].items():
        say(f"{measure_name} ({name})".ljust(24) + f"{value:.6g}")
    for line in result["cautions"]:
        say(f"note: {line}")
    say(f"result in {out}")
