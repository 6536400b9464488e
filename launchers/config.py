"""The config of each launcher, nesting the dataclasses that live beside the code they configure.

Fields without a default must be given, in the YAML file or on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from models.var import VARConfig
from models.vqvae import VQVAEConfig
from training.engine import EngineConfig
from training.loop import LoopConfig
from training.losses import ReconstructionLossConfig
from training.optim import OptimizerConfig
from training.tokenizer_loop import CodebookCareConfig, DiscriminatorConfig
from training.tracking import TrackingConfig


def refuse_below_zero(**settings: int) -> None:
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")


@dataclass(frozen=True)
class ViewConfig:
    """How a picture becomes a training view: short side to image_size * resize_ratio, then a crop."""

    resize_ratio: float = 1.125
    flip: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Folders of packed shards, each with an index.json."""

    train: str = "data/imagenet256/codes/train"
    validation: str = "data/imagenet256/codes/val"
    workers: int = 2
    views: ViewConfig = field(default_factory=ViewConfig)  # for image shards; code shards hold finished views

    def __post_init__(self) -> None:
        refuse_below_zero(**{"data.workers": self.workers})


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """launchers/pack_images.py: a folder of images, or the word `digits`, to image shards."""

    source: str
    out: str
    val_fraction: float = 0.0  # held out of `source` when it has no train/ and val/ of its own
    resize_short_side: int | None = None  # pixels; the official recipe's crops need 288. None keeps the files' bytes
    samples_per_shard: int = 10_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the runs of both stages have. `run` is the folder that a run is."""

    run: str
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        refuse_below_zero(seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(RunConfig):
    """launchers/train_tokenizer.py: stage 1."""

    model: VQVAEConfig = field(default_factory=VQVAEConfig)
    loss: ReconstructionLossConfig = field(default_factory=ReconstructionLossConfig)
    codebook: CodebookCareConfig = field(default_factory=CodebookCareConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """launchers/encode_codes.py: image shards to code shards, with a trained tokenizer."""

    tokenizer: str
    images: str
    out: str
    views: int = 16  # random crops a training image; validation images get one centre crop
    view: ViewConfig = field(default_factory=ViewConfig)
    batch: int = 64
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """launchers/train.py: stage 2."""

    tokenizer: str
    model: VARConfig
    label_drop: float = 0.1  # share of labels replaced by the null class, for classifier-free guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop is {self.label_drop}; it is a probability, in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """launchers/sample.py: images from a trained run."""

    run: str
    tokenizer: str = ""  # empty: the one the run was trained with
    out: str = ""  # folder; empty: RUN/samples
    per_class: int = 10
    classes: tuple[int, ...] = ()  # empty: all
    cfg: float = 1.5
    top_k: int = 900  # 0: off
    top_p: float = 0.96  # 1: off
    batch: int = 50
    seed: int = 0
