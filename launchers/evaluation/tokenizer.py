"""`evaluate.py tokenizer`: how well codes keep held-out images, and how the codes are used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, say
from data_pipeline.files.atomic import atomic_file, file_sha256
from launchers.evaluation.extraction import compute_units, ranks
from launchers.evaluation.images import open_image_set
from launchers.sampling.pictures import to_uint8
from launchers.setup.loading import load_tokenizer
from launchers.setup.settings import refuse_unknown
from models.vqvae import VQVAE
from training.engine.repeatable import map_alone
from training.evaluation.extractors import EXTRACTORS, Extractor, Features, load_extractor
from training.evaluation.fidelity import WINDOW, bits_per_pixel, code_counts, code_usage, psnr, ssim
from training.evaluation.gaussians import frechet_distance, gaussian_of
from training.evaluation.reference import Reference
from training.tracking.mlflow import code_version

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EvaluateTokenizerConfig:
    """The settings of `evaluate.py tokenizer`."""

    run: str  # a run folder of train_tokenizer.py, or an imported or exported tokenizer
    images: str  # held-out pictures: image shards, a folder of pictures, or an npz file
    reference: str = ""  # of real images, for rFD; empty: without
    out: str = ""  # the result; empty: RUN/evaluation-tokenizer.json
    resize_ratio: float = 1.125  # image shards: that of the views the tokenizer was trained on
    extractor: str = "lite0"  # that of the reference
    weights: str = ""

    def __post_init__(self) -> None:
        refuse_unknown(EXTRACTORS, extractor=self.extractor)


def launch_tokenizer(command: Command[EvaluateTokenizerConfig]) -> None:
    """Reconstruct a set of images and measure what was lost, on any number of ranks."""
    config = command.config
    tokenizer, sha256 = load_tokenizer(config.run)
    images = open_image_set(config.images, tokenizer.config.image_size, config.resize_ratio)
    if images.side != tokenizer.config.image_size:
        raise ValueError(
            f"{config.images}: has images of {images.side} pixels, the tokenizer takes {tokenizer.config.image_size}; "
            "name image shards, from which views of any size are cut"
        )
    reference = Reference.load(Path(config.reference)) if config.reference else None
    out = Path(config.out) if config.out else Path(config.run) / "evaluation-tokenizer.json"
    with ranks() as world:
        extractor = load_extractor(config.extractor, config.weights, world.device) if reference else None
        if reference and extractor:
            reference.check(extractor, images.side)
        if command.dry_run:
            say(f"would reconstruct {images.count:,} images of {images.side} pixels, into {out}")
            return
        tokenizer.to(world.device)
        units = list(
            compute_units(
                images, lambda pixels: reconstruct(tokenizer, extractor, pixels), out.with_suffix(".parts"), world
            )
        )
        if not world.is_rank_zero:
            return
    measures = summarise(tokenizer, units, reference)
    result = {
        "measures": measures,
        "images": {"count": images.count, "side": images.side, **images.identity},
        "tokenizer_sha256": sha256,
        "extractor": {"name": extractor.name, "sha256": extractor.sha256} if extractor else None,
        "reference": {"sha256": file_sha256(Path(config.reference)), **reference.description} if reference else None,
        "code": code_version(),
    }
    with atomic_file(out) as file:
        file.write(f"{json.dumps(result, indent=1)}\n".encode())
    tell(measures, tokenizer, config.extractor)
    say(f"result in {out}")


def reconstruct(tokenizer: VQVAE, extractor: Extractor | None, pixels: np.ndarray) -> dict[str, Any]:
    """Encode and decode images (n, H, W, 3) uint8; return their PSNR and SSIM, code counts, and the features after."""
    codes, decoded = through(tokenizer, pixels)
    originals = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    levels = torch.from_numpy(decoded).permute(0, 3, 1, 2)
    counts = code_counts(codes, tokenizer.scales, tokenizer.config.quantizer.vocab_size)
    arrays = {"psnr": psnr(originals, levels).numpy(), "counts": counts.cpu().numpy()}
    if min(levels.shape[-2:]) >= WINDOW:
        arrays["ssim"] = ssim(originals, levels).numpy()
    if extractor:
        arrays["features"] = extractor.extract(decoded).features
    return arrays


def through(tokenizer: VQVAE, pixels: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Encode images (n, H, W, 3) uint8 to codes (n, L) and decode these to images of the same shape."""
    device = next(tokenizer.parameters()).device

    def encode_and_decode(images: Tensor) -> tuple[Tensor, np.ndarray]:
        codes = tokenizer.encode(images)
        return codes, to_uint8(tokenizer.decode(codes))

    levels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    found = map_alone(encode_and_decode, levels.to(device) / 127.5 - 1)
    return torch.cat([codes for codes, _ in found]), np.concatenate([decoded for _, decoded in found])


def summarise(tokenizer: VQVAE, units: list[dict[str, np.ndarray]], reference: Reference | None) -> dict[str, Any]:
    """Bring the arrays of all units into the measures of the result."""
    of_images = [name for name in ("psnr", "ssim") if name in units[0]]
    measures: dict[str, Any] = {
        name: float(np.concatenate([unit[name] for unit in units]).mean()) for name in of_images
    }
    if reference:
        features = Features.join([Features(unit["features"]) for unit in units]).features
        measures["rfd"] = frechet_distance(gaussian_of(features), reference.gaussian)
    usage = code_usage(torch.from_numpy(sum(unit["counts"] for unit in units)))
    measures |= usage
    measures["bits_per_pixel"] = bits_per_pixel(usage["perplexity"], tokenizer.scales, tokenizer.config.image_size)
    return measures


def tell(measures: dict[str, Any], tokenizer: VQVAE, extractor: str) -> None:
    """Print the measures, those of codes scale by scale."""
    names = {"psnr": "PSNR (dB)", "ssim": "SSIM", "rfd": f"rFD ({extractor})", "bits_per_pixel": "bits a pixel"}
    for name, shown in names.items():
        if name in measures:
            say(f"{shown:20s}{measures[name]:.6g}")
    for side, used, perplexity in zip(tokenizer.scales.patch_nums, measures["codes_used"], measures["perplexity"]):
        say(f"scale {f'{side} x {side}':14s}{used:6d} codes used, perplexity {perplexity:.1f}")
