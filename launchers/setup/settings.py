"""The settings that several commands share; each command declares its own at the top of its file.

A field without a default must be given, in the YAML file or on the command line.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from data_pipeline.loading.datasets import STRICT, bad_sample_limit
from data_pipeline.loading.plan import WINDOW_SAMPLES
from data_pipeline.remote.cache import CacheConfig
from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig
from training.planning.step_time import ClusterConfig
from training.supervision.divergence import DivergenceConfig
from training.supervision.watch import WatchConfig
from training.tracking.record import TrackingConfig

LABEL_DROP = 0.1  # the paper's recipe


def refuse_below_zero(**settings: int) -> None:
    """Raise ValueError for a setting below 0."""
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")


def refuse_unknown(accepted: Collection[str], **settings: str) -> None:
    """Raise ValueError for a setting that is none of the accepted words."""
    for name, value in settings.items():
        if value not in accepted:
            raise ValueError(f"{name} is {value}; accepted: {', '.join(accepted)}")


def refuse_no_png(out: str) -> None:
    """Raise ValueError if `out` is not the name of a PNG file."""
    if not out.endswith(".png"):
        raise ValueError(f"out is {out!r}; it must be the name of a .png file")


@dataclass(frozen=True)
class ViewConfig:
    """How a picture becomes a training view: its short side is scaled to image_size * resize_ratio, then cropped."""

    resize_ratio: float = 1.125
    flip: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Folders of packed shards, or http(s) or s3 URLs of such, each with an index.json."""

    train: str = "data/imagenet256/codes/train"
    validation: str = "data/imagenet256/codes/val"
    workers: int = 2  # processes that read ahead, for images; 0: a thread of the run does, which is enough for codes
    views: ViewConfig = field(default_factory=ViewConfig)  # for image shards; code shards hold finished views
    bad_samples: str = STRICT  # a bad sample ends the run; "quarantine:MAX": up to MAX are replaced and listed
    window: int = WINDOW_SAMPLES  # samples that are shuffled together; of remote shards the cache must hold as many
    cache: CacheConfig = field(default_factory=CacheConfig)  # of remote shards

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}; it must be 0 or more")
        if self.window < 1:
            raise ValueError(f"data.window is {self.window}; it must be 1 sample or more")
        bad_sample_limit(self.bad_samples)

    @property
    def max_bad(self) -> int:
        """The number of bad samples that a run bears."""
        return bad_sample_limit(self.bad_samples)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of a run of either stage; `run` is the folder that a run is."""

    run: str
    seed: int = 0
    init_from: str = ""  # a run or an imported or exported model whose weights training starts from; empty: from seed
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        refuse_below_zero(seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """The settings of a run of stage 2, which launchers/train.py trains."""

    tokenizer: str
    model: VARConfig
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # what --dry-run models; training does not read it
    label_drop: float = LABEL_DROP  # share of labels replaced by the null class, for classifier-free guidance

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop is {self.label_drop}; it is a probability, in [0, 1)")
        # The default passes, since nobody asked for it: an unconditional config need not switch off what it never had.
        if not self.model.is_conditional and self.label_drop not in (0, LABEL_DROP):
            raise ValueError(
                f"label_drop is {self.label_drop}; without labels (model.num_classes 0) it has no effect: leave it out"
            )
