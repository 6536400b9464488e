"""The config of each launcher, nesting the dataclasses that live beside the code they configure.

Fields without a default must be given, in the YAML file or on the command line.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from launchers.setup.data_config import DataConfig, ViewConfig
from models.var import VARConfig
from models.vqvae import VQVAEConfig
from training.engine.engine import PRECISIONS, EngineConfig
from training.loop_config import LoopConfig
from training.losses import ReconstructionLossConfig
from training.optim import OptimizerConfig
from training.planning.step_time import ClusterConfig
from training.supervision.divergence import DivergenceConfig
from training.supervision.watch import WatchConfig
from training.tokenizer_loop import CodebookCareConfig, DiscriminatorConfig
from training.tracking.record import TrackingConfig

LABEL_DROP = 0.1  # the paper's recipe
EXPORT_FORMATS = ("safetensors", "reference")
MAX_DEPENDENCY_IMAGES = 16
SAMPLE_FORMATS = ("png", "npz")
EDIT_TASKS = ("inpaint", "outpaint", "edit")


def refuse_below_zero(**settings: int) -> None:
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")


def refuse_unknown(accepted: Collection[str], **settings: str) -> None:
    for name, value in settings.items():
        if value not in accepted:
            raise ValueError(f"{name} is {value}; accepted: {', '.join(accepted)}")


def refuse_no_png(out: str) -> None:
    if not out.endswith(".png"):
        raise ValueError(f"out is {out!r}; it must be the name of a .png file")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """launchers/pack_images.py: a folder of images, or the word `digits`, to image shards."""

    source: str
    out: str
    val_fraction: float = 0.0  # held out of `source` when it has no train/ and val/ of its own
    # pixels, to which longer short sides are scaled down: 1.125 times the crops of the official recipe; null: none are
    resize_short_side: int | None = 288
    samples_per_shard: int = 10_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the runs of both stages have. `run` is the folder that a run is."""

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


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """launchers/sample.py: images from a run or a public checkpoint. Defaults: those of the released models' FID."""

    run: str  # a run folder, a checkpoint, an imported or exported model, or a public .pth file
    tokenizer: str = ""  # empty: the one the run was trained with
    patch_nums: tuple[int, ...] = ()  # for a public file with a schedule of its own
    out: str = ""  # folder; empty: RUN/samples, and samples/NAME for a file NAME.pth
    format: str = "png"  # one file per image; or "npz": one file of all for the ADM evaluator
    per_class: int = 10
    classes: tuple[int, ...] = ()  # empty: all
    cfg: float = 1.5  # guidance at the last scale, growing from 0 at the first; 0: off
    guidance: tuple[float, ...] = ()  # instead of cfg: the strength at every scale
    top_k: int = 900  # 0: off
    top_p: float = 0.96  # 1: off
    smooth: bool = False  # Gumbel-softmax smoothing: better to look at, worse to measure
    precision: str = "fp32"  # of the transformer, or bf16 (then also that of the decoder) or fp16
    compile: bool = False  # compile the transformer's steps, and a GPU's decoder: a slow start, for many images
    batch: int = 50  # images at once; memory limits it: in fp32 50 take 8 GiB of cache at d16, 29 at d30, 138 at 512 px
    seed: int = 0
    mlflow: bool = True  # log the grid to the run's MLflow run

    def __post_init__(self) -> None:
        refuse_unknown(SAMPLE_FORMATS, format=self.format)
        refuse_unknown(PRECISIONS, precision=self.precision)
        if self.smooth and self.format == "npz":
            raise ValueError("smooth is on and format is npz; smoothed images are never to be measured: use format=png")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """launchers/edit.py: parts of a picture drawn anew. Sampling defaults: those of the public notebook."""

    run: str  # a run folder, a checkpoint, an imported or exported model, or a public .pth file
    tokenizer: str = ""  # empty: the one the run was trained with
    patch_nums: tuple[int, ...] = ()  # for a public file with a schedule of its own
    image: str
    task: str  # inpaint: the box is drawn anew; outpaint: the box stays; edit: the box is drawn anew as class `label`
    box: tuple[float, ...] = ()  # Y0 X0 Y1 X1, pixels of the image file
    mask: str = ""  # instead of a box: a picture of the image's size, white where the box would be
    label: int | None = None  # the class to draw; without it none is asked for
    out: str = ""  # folder; empty: one in RUN/edits named after picture, task, place and class
    variants: int = 4  # results, each with a seed of its own
    cfg: float = 3.0
    top_k: int = 900  # 0: off
    top_p: float = 0.95  # 1: off
    smooth: bool = False  # Gumbel-softmax smoothing, which the public notebook has on
    keep_coarsest: bool = True  # the 1x1 scale, a mean of the whole picture, is the original's, as in the notebook
    keep_pixels: bool = False  # put the original's pixels back where the picture stays
    feather: int | None = None  # pixels over which they then fade out into what is drawn; null: half a token
    precision: str = "fp32"  # of the transformer, or bf16 or fp16
    batch: int = 8  # results at once; memory limits it
    seed: int = 0
    mlflow: bool = True  # log the panel to the run's MLflow run

    def __post_init__(self) -> None:
        refuse_unknown(EDIT_TASKS, task=self.task)
        refuse_unknown(PRECISIONS, precision=self.precision)
        if bool(self.box) == bool(self.mask):
            raise ValueError(f"{'both box and' if self.box else 'neither box nor'} mask given; give one of them")
        if self.box and len(self.box) != 4:
            raise ValueError(f"box has {len(self.box)} numbers; it is Y0 X0 Y1 X1, in pixels of the image")
        for name in ("variants", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        refuse_below_zero(feather=self.feather or 0, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """launchers/import_weights.py: public .pth files to a folder that every launcher takes. One of the two will do."""

    tokenizer: str = ""
    var: str = ""
    out: str
    patch_nums: tuple[int, ...] = ()  # empty: known by the transformer's length; of a tokenizer alone, that of 256 px

    def __post_init__(self) -> None:
        if not (self.tokenizer or self.var):
            raise ValueError("nothing to import; give --var FILE, --tokenizer FILE, or both")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """launchers/export_weights.py: a run's weights, with its tokenizer, to a folder to hand on."""

    run: str
    out: str
    format: str = "safetensors"  # or "reference": files that the public code loads
    tokenizer: str = ""  # empty: the one the run was trained with

    def __post_init__(self) -> None:
        refuse_unknown(EXPORT_FORMATS, format=self.format)


@dataclass(frozen=True, kw_only=True)
class CompareSizesConfig:
    """launchers/compare_sizes.py: images of several sizes at several stages of their training."""

    runs: tuple[str, ...]  # run folders, one row each; an imported, exported or public model has the last stage alone
    stages: tuple[float, ...] = (0.2, 0.6, 1.0)  # shares of a run's training tokens, one column each
    tolerance: float = 0.05  # how far a checkpoint may lie from its stage
    classes: tuple[int, ...] = ()  # one image each; empty: the paper's nine for 1000 classes, else the first nine
    out: str  # the PNG to write
    tokenizer: str = ""  # empty: the one the runs were trained with
    patch_nums: tuple[int, ...] = ()  # for public files with a schedule of their own
    mlflow: bool = True  # log the figure to the first run's MLflow run
    data: str = ""  # validation shards to force tokens from; empty: those of the first run's config.yaml
    forced_scales: int = 1  # how many scales are those of a real image of the class; 0: none
    cfg: float = 1.5
    top_k: int = 900  # 0: off
    top_p: float = 0.96  # 1: off
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("runs", "stages"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it needs at least one")
        for stage in self.stages:
            if not 0 < stage <= 1:
                raise ValueError(f"stages has {stage}; it holds shares of the training, above 0 and up to 1")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it is a share of the training, from 0 to below 1")
        refuse_below_zero(forced_scales=self.forced_scales)
        refuse_no_png(self.out)


@dataclass(frozen=True, kw_only=True)
class DependencyConfig:
    """launchers/plot_dependencies.py: which tokens of a tokenizer's encoder depend on which."""

    tokenizer: str
    images: str  # a folder of image shards
    num_images: int = 4
    out: str  # the PNG to write; the numbers go beside it as JSON
    views: ViewConfig = field(default_factory=ViewConfig)
    seed: int = 0  # of the choice of images
    mlflow: bool = True  # log the figure to the tokenizer's MLflow run

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= MAX_DEPENDENCY_IMAGES:
            raise ValueError(f"num_images is {self.num_images}; accepted: 1 to {MAX_DEPENDENCY_IMAGES}")
        refuse_below_zero(seed=self.seed)
        refuse_no_png(self.out)


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """launchers/sync_mlflow.py: to MLflow what it lacks of a run. `run` may be given without its name."""

    run: str = field(metadata={"is_bare": True})
    uri: str = ""  # of the tracker; empty: the one that the run's mlflow.json names, else that of its config.yaml
    experiment: str = ""  # empty: likewise
