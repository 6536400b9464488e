"""Synthetic code shards whose entropy is known: data for a scaling study that needs no images and no trained tokenizer.

`python launchers/synthesize_codes.py --config configs/synthetic/source.yaml`

OUT/train and OUT/val are code shards like those of encode_codes.py. OUT/tokenizer is a small tokenizer with random
weights, so that train.py runs on them as on any other codes. OUT/source.json has the loss of a perfect model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launchers.setup.command_line import Command, refuse_several_ranks, run_launcher, say
from data_pipeline.files.atomic import atomic_file
from data_pipeline.making.encoding import is_encoded
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.writer import Sample, write_shards
from launchers.study.tree_source import TreeSource, TreeSourceConfig
from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.vqvae import VQVAE, VQVAEConfig
from training.checkpoints.model_on_disk import ModelOnDisk, describe, write_model

import numpy as np
import torch

TRAIN_STREAM = 0
VALIDATION_STREAMS = range(1, 257)  # so many sets are drawn, and the most typical one is taken
SOURCE = "source.json"


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """launchers/synthesize_codes.py: how many images, of which source. Equal settings give equal codes."""

    out: str
    source: TreeSourceConfig = field(default_factory=TreeSourceConfig)
    train: int = 20_480  # images
    validation: int = 1024
    code_width: int = 16  # of the tokenizer's code vectors, from which a transformer has to tell the codes
    samples_per_shard: int = 10_000
    seed: int = 0  # of the images and the code vectors; the tables have source.seed

    def __post_init__(self) -> None:
        for name in ("train", "validation", "code_width", "samples_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")

    @property
    def tokenizer(self) -> VQVAEConfig:
        """The smallest tokenizer that fits the codes. Its phi does nothing, so that their vectors simply add up."""
        return VQVAEConfig(
            patch_nums=self.source.patch_nums,
            autoencoder=AutoencoderConfig(width=32, multipliers=(1,), num_res_blocks=1, code_width=self.code_width),
            quantizer=QuantizerConfig(self.source.vocab_size, self.code_width, num_phi=1, phi_ratio=0.0),
        )


def launch(command: Command[SynthesizeConfig]) -> None:
    """Write what is not there yet: the tokenizer, both splits and source.json."""
    config, out = command.config, Path(command.config.out)
    refuse_several_ranks("synthesize_codes.py")
    if command.dry_run:
        say(f"would draw {config.train} images into {out}/train and {config.validation} into {out}/val")
        return
    source = TreeSource(config.source)
    sha256 = ensure_tokenizer(config, out / "tokenizer")
    write_split(config, source, sha256, out / "train", TRAIN_STREAM, config.train)
    stream = typical_stream(source, config.validation, seed=config.seed)
    write_split(config, source, sha256, out / "val", stream, config.validation)
    facts = describe_source(config, source, stream)
    with atomic_file(out / SOURCE) as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")
    entropies = f"{facts['entropy_last']:.5f} nats a token at the last scale, {facts['entropy_avg']:.5f} on average"
    say(f"{out}: {config.train} and {config.validation} images; entropy {entropies}")


def ensure_tokenizer(config: SynthesizeConfig, folder: Path) -> str:
    """Write a tokenizer with random weights, if there is none of these sizes yet; return its sha256."""
    model = ModelOnDisk(folder)
    if not model.is_whole:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            tokenizer = VQVAE(config.tokenizer)
            torch.nn.init.normal_(tokenizer.quantizer.codebook)  # far apart, unlike before a training
        write_model(folder, tokenizer.state_dict(), describe(config.tokenizer))
    elif {"kind": model.kind, **model.config()} != describe(config.tokenizer):
        raise ValueError(f"{folder}: holds a tokenizer of other sizes than these settings need; delete {folder.parent}")
    return model.sha256()


def write_split(
    config: SynthesizeConfig, source: TreeSource, sha256: str, folder: Path, stream: int, num_images: int
) -> None:
    """Write one split unless it is there. Raises ValueError if it was made with other settings."""
    code_format = CodeFormat.for_vocab(config.source.num_tokens, config.source.vocab_size, 1)
    meta: dict[str, Any] = {
        "patch_nums": list(config.source.patch_nums),
        "vocab_size": config.source.vocab_size,
        "num_tokens": code_format.num_tokens,
        "bits": code_format.bits,
        "views": 1,
        "view": "synthetic",
        "tokenizer_sha256": sha256,
        "classes": [str(label) for label in range(config.source.num_classes)],
        "source": settings_of(config.source),
        "seed": config.seed,
        "stream": stream,
        "images": num_images,
    }
    if not is_encoded(folder, meta):
        codes, labels = source.draw(num_images, seed=config.seed, stream=stream)
        samples = records(code_format, codes, labels)
        write_shards(samples, folder, kind="codes", meta=meta, samples_per_shard=config.samples_per_shard)


def records(code_format: CodeFormat, codes: np.ndarray, labels: np.ndarray) -> Iterator[Sample]:
    """Yield codes (B, L) and labels (B,) as samples of code shards."""
    for number, (row, label) in enumerate(zip(codes, labels)):
        yield Sample(f"{number:09d}", {code_format.suffix: code_format.pack(int(label), row[None])})


def typical_stream(source: TreeSource, num_images: int, *, seed: int) -> int:
    """Return the stream of VALIDATION_STREAMS on which the source's own loss is nearest to its entropy.

    On a thousand images of any stream it is off by 0.01 nats, as much as the reducible losses of sizes differ. On
    typical images the entropy is what a perfect model loses, and the irreducible part of a law can be compared with it.
    """
    entropy = source.entropy()

    def distance(stream: int) -> float:
        excess = source.loss(*source.draw(num_images, seed=seed, stream=stream)) - entropy
        return max(abs(excess[-1]), abs(source.average(excess)))

    return min(VALIDATION_STREAMS, key=distance)


def describe_source(config: SynthesizeConfig, source: TreeSource, stream: int) -> dict[str, Any]:
    """Return what source.json says, in nats a token: the entropy, and the source's own loss on validation images."""
    entropy = source.entropy()
    own = source.loss(*source.draw(config.validation, seed=config.seed, stream=stream))
    return {
        "entropy_last": float(entropy[-1]),
        "entropy_avg": source.average(entropy),
        "entropy": entropy.tolist(),
        "validation_loss_last": float(own[-1]),
        "validation_loss_avg": source.average(own),
        "validation_loss": own.tolist(),
        "source": settings_of(config.source),
    }


def settings_of(config: TreeSourceConfig) -> dict[str, Any]:
    """Return the settings of a source as JSON gives them back."""
    return json.loads(json.dumps(asdict(config)))


def main() -> None:
    """Run the command."""
    run_launcher(SynthesizeConfig, launch, __doc__)


if __name__ == "__main__":
    main()
