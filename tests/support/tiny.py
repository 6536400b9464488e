"""The smallest models, batches, engine and study on which both stages can be driven in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.loading.datasets import CodeDataset
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import Storage
from data_pipeline.shards.writer import Sample, write_shards
from launchers import encode_codes, pack_images, train
from launchers.encode_codes import EncodeConfig
from launchers.pack_images import PackConfig
from launchers.setup.command_line import Command
from launchers.setup.running import Supervision
from launchers.setup.settings import DataConfig, TrainConfig, ViewConfig
from models.autoencoder import AutoencoderConfig
from models.quantizer import QuantizerConfig
from models.reference import tokenizer_to_state_dict, var_to_state_dict
from models.var import VAR, VARConfig
from models.vqvae import VQVAE, VQVAEConfig
from training.checkpoints.checkpoint import TrainState
from training.checkpoints.model_on_disk import describe, write_model
from training.engine.distributed import World
from training.engine.engine import EngineConfig
from training.engine.whole_state import WholeState
from training.loop_config import LoopConfig
from training.supervision.stopping import Stopping
from training.supervision.watch import Heartbeat
from training.tracking.record import TrackingConfig

ALONE = World()
PATCH_NUMS = (1, 2)  # 5 tokens
PACK_OPTIONS = {
    "samples_per_shard": 4,
    "seed": 0,
    "val_fraction": 0.25,
    "resize_short_side": None,
    "report": lambda line: None,
}
VIEWS = 3  # of the codes that `pack_codes` writes
ONE_TO_ONE = ViewConfig(resize_ratio=1.0)  # the pictures have the tokenizer's size already
VAR_CONFIG = VARConfig(depth=1, patch_nums=PATCH_NUMS, vocab_size=16, code_width=4, num_classes=3)
VQVAE_CONFIG = VQVAEConfig(
    patch_nums=PATCH_NUMS,
    autoencoder=AutoencoderConfig(width=32, multipliers=(1, 1, 1), num_res_blocks=1, code_width=4),
    quantizer=QuantizerConfig(vocab_size=16, code_width=4, num_phi=0),
)


def make_tokenizer(seed: int = 0, config: VQVAEConfig = VQVAE_CONFIG) -> VQVAE:
    """A tokenizer of 8 x 8 pixels whose codes lie far apart, so that many of them are used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = VQVAE(config)
        tokenizer.quantizer.codebook.data.normal_(0, 0.3)
    return tokenizer


@dataclass(frozen=True)
class Batch:
    """What the loops read of a loader's batch."""

    data: Tensor
    labels: Tensor
    positions: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Batch:
        return self

    def rows(self, part: slice) -> Batch:
        return Batch(self.data[part], self.labels[part], self.positions[part], self.weights[part])

    def with_weights(self, *weights: float) -> Batch:
        return replace(self, weights=torch.tensor(weights))


def code_batch(number: int, first_position: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first_position)
    codes = torch.randint(VAR_CONFIG.vocab_size, (number, VAR_CONFIG.scales.num_tokens), generator=generator)
    labels = torch.arange(number) % VAR_CONFIG.num_classes
    return Batch(codes, labels, first_position + torch.arange(number), torch.ones(number))


def image_batch(number: int, seed: int = 0) -> Batch:
    side = VQVAE_CONFIG.image_size
    images = torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Batch(images, torch.zeros(number, dtype=torch.int64), torch.arange(number), torch.ones(number))


class PlainEngine:
    """`training.engine.engine.Engine` without DeepSpeed: a module, plain SGD, and an accumulation counter."""

    def __init__(self, model: nn.Module, *, accumulation: int = 1, global_batch: int = 4, world: World = ALONE) -> None:
        self.model = model
        self.accumulation = accumulation
        self.global_batch = global_batch
        self.world = world
        self.config = EngineConfig(zero_stage=0, precision="fp32")
        self.state = WholeState(model, torch.optim.AdamW(model.parameters()), World())  # its moments stay zero
        self.updates = 0
        self._micro_steps = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, *, learning_rate: float, weight_decay: float) -> Tensor:
        self._micro_steps += 1
        if self._micro_steps % self.accumulation:
            return torch.zeros((), device=next(self.model.parameters()).device)
        self.updates += 1
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        with torch.no_grad():
            for parameter in parameters:
                parameter -= learning_rate * (parameter.grad + weight_decay * parameter)
        self.model.zero_grad()
        return norm


def codes_of(sample_id: int, view: int) -> np.ndarray:
    """Codes that say whose they are: (L,)."""
    return np.array([sample_id, view, 0, 0, 7])


def pack_codes(folder: Path, num_samples: int = 21, *, label: Callable[[int], int] = lambda i: i % 3) -> Path:
    code_format = CodeFormat(num_tokens=5, views=VIEWS, bits=12)
    records = [
        code_format.pack(label(i), np.stack([codes_of(i, view) for view in range(VIEWS)])) for i in range(num_samples)
    ]
    samples = [Sample(f"{i:09d}", {"vq12": record}) for i, record in enumerate(records)]
    meta = {"patch_nums": [1, 2], "vocab_size": 64, "num_tokens": 5, "bits": 12, "views": VIEWS}
    meta |= {"tokenizer_sha256": "a" * 64, "classes": list("abc")}
    write_shards(samples, folder, kind="codes", meta=meta, samples_per_shard=4)
    return folder


def open_codes(folder: Path | Storage, **options: int) -> CodeDataset:
    return CodeDataset(folder, patch_nums=PATCH_NUMS, vocab_size=64, tokenizer_sha256="a" * 64, **options)


@dataclass(frozen=True)
class Study:
    """A folder with packed pictures, a tokenizer, and their codes."""

    folder: Path

    def encode_config(self, **changes: Any) -> EncodeConfig:
        paths = {"tokenizer": "tokenizer", "images": "images", "out": "codes"}
        settings = {name: str(self.folder / path) for name, path in paths.items()} | {"views": 2, "view": ONE_TO_ONE}
        return EncodeConfig(**(settings | changes))

    def train_config(self, run: str = "run", *, kind: str = "codes", **loop: Any) -> TrainConfig:
        return TrainConfig(
            run=str(self.folder / run),
            tokenizer=str(self.folder / "tokenizer"),
            model=VAR_CONFIG,
            data=DataConfig(
                train=str(self.folder / kind / "train"),
                validation=str(self.folder / kind / "val"),
                workers=0,
                views=ONE_TO_ONE,
            ),
            engine=EngineConfig(zero_stage=0, precision="fp32", micro_batch=2),
            loop=LoopConfig(global_batch=4, epochs=2.0, validate_every=1.0, **loop),
            tracking=TrackingConfig(mlflow=False),
        )


def make_study(folder: Path, config: VQVAEConfig = VQVAE_CONFIG) -> Study:
    """config: of the tokenizer."""
    found = Study(folder)
    side, generator = VQVAE_CONFIG.image_size, np.random.default_rng(0)
    for label in ("a", "b", "c"):
        (found.folder / "pictures" / label).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(found.folder / "pictures" / label / f"{number}.png")
    images, pictures = str(found.folder / "images"), str(found.folder / "pictures")
    pack_images.launch(command(PackConfig(source=pictures, out=images, val_fraction=0.25)))
    write_model(found.folder / "tokenizer", make_tokenizer(config=config).state_dict(), describe(config))
    encode_codes.launch(command(found.encode_config()))
    return found


def write_public_files(folder: Path, *, seed: int = 0) -> tuple[str, str]:
    """A tiny transformer and a tiny tokenizer in the public code's format; their paths."""
    files = folder / "var_d1.pth", folder / "vae_ch32v16z4.pth"
    torch.save(var_to_state_dict(VAR(VAR_CONFIG, seed=seed)), files[0])
    torch.save(tokenizer_to_state_dict(make_tokenizer(seed)), files[1])
    return str(files[0]), str(files[1])


def write_models(folder: Path, *, seed: int = 0) -> str:
    write_model(folder, VAR(VAR_CONFIG, seed=seed).state_dict(), describe(VAR_CONFIG))
    write_model(folder / "tokenizer", make_tokenizer(seed).state_dict(), describe(VQVAE_CONFIG))
    return str(folder)


def command(config: Any, **options: Any) -> Command[Any]:
    return Command(config, **({"dry_run": False, "world_size": None} | options))


def train_var(config: TrainConfig) -> tuple[TrainState, VAR]:
    """Run `launchers/train.py` in this process, with a plain engine in the place of DeepSpeed's."""
    models: list[VAR] = []

    def start_engine(model: VAR, *_: Any, global_batch: int, **__: Any) -> PlainEngine:
        models.append(model)
        accumulation = global_batch // config.engine.micro_batch
        return PlainEngine(model, accumulation=accumulation, global_batch=global_batch)

    run, world = Path(config.run), World()
    nobody = Supervision(Stopping(run, world), Heartbeat(config.watch))
    with mock.patch.multiple(train, Engine=start_engine, join_world=mock.DEFAULT, leave_world=mock.DEFAULT):
        return train.train(config, world, nobody), models[0]
