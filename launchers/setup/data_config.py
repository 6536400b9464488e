"""Settings that say which data a run reads, how pictures become views, and how shards are indexed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipeline.images.decoding import JSON_KEY
from data_pipeline.loading.datasets import STRICT, bad_sample_limit
from data_pipeline.loading.plan import WINDOW_SAMPLES
from data_pipeline.remote.remote import CacheConfig


@dataclass(frozen=True)
class ViewConfig:
    """How a picture becomes a training view: short side to image_size * resize_ratio, then a crop."""

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
        """How many bad samples a run bears."""
        return bad_sample_limit(self.bad_samples)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """launchers/index_shards.py: an index for WebDataset tars that lie somewhere, which stay as they are."""

    shards: tuple[str, ...]  # paths or URLs, with {000..127} for many; or one .txt file with one of them in each line
    out: str  # the folder for index and tables
    classes: int | None = None  # how many there are; none: as many as the labels found need
    json_label: str = JSON_KEY  # the field that is the class number, where a sample has json and no cls
    decode: bool = False  # decode every image, and list those that cannot be
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("shards is empty; give paths or URLs of .tar files")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes is {self.classes}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """launchers/verify_shards.py: every byte of a packed folder against its index; `folder=` may be left out."""

    folder: str = field(metadata={"is_bare": True})  # with an index.json, or with such folders in it; or a URL
    decode: bool = False  # decode every image, and unpack every code
    cache: CacheConfig = field(default_factory=CacheConfig)
