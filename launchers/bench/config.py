"""The settings of launchers/benchmark.py: what is measured, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from launchers.setup.settings import refuse_unknown
from models.attention import ATTENTIONS, PER_SCALE
from models.autoencoder import NORM_GROUPS
from models.scales import PATCH_NUMS_256, Scales
from models.var import CHECKPOINTINGS, NO_CHECKPOINTING
from training.engine.engine import PRECISIONS

BENCHMARKS = ("train", "sample", "tokenizer", "data", "attention", "suite")
ALL, OURS = "all", "ours"  # contestants of a training step
SETTINGS_OF_SUITE = ("what", "against", "repeats", "out")  # it chooses all others itself


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What launchers/benchmark.py measures, and on what. `what` may be given without its name."""

    what: str = field(metadata={"is_bare": True})  # one of BENCHMARKS
    folder: str = ""  # data: a packed folder to read; empty: made for the purpose
    depth: int = 8  # of the transformer
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    tokenizer_width: int = 160  # that of the released one
    batch: int = 4  # images at once
    batches: tuple[int, ...] = ()  # sample: more batch sizes
    precision: str = "fp32"  # or bf16 or fp16
    compile: bool = False  # compile the transformer's blocks
    attention: str = PER_SCALE  # of training: or flex, or masked
    activation_checkpointing: str = NO_CHECKPOINTING  # of training: or selective, or full
    zero_stage: int | None = None  # of training: 0 to 3; null: 0 in fp32, else 1
    contestants: str = ALL  # train: or ours, alone on the device
    against: str = ""  # a clone of the public VAR code to measure beside; empty: none
    repeats: int = 7  # turns that are timed
    out: str = ""  # a .json file for the figures; empty: none

    def __post_init__(self) -> None:
        refuse_unknown(BENCHMARKS, what=self.what)
        refuse_unknown(PRECISIONS, precision=self.precision)
        refuse_unknown(ATTENTIONS, attention=self.attention)
        refuse_unknown(CHECKPOINTINGS, activation_checkpointing=self.activation_checkpointing)
        refuse_unknown((ALL, OURS), contestants=self.contestants)
        for name in ("repeats", "batch", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if any(batch < 1 for batch in self.batches):
            raise ValueError(f"batches is {list(self.batches)}; each must be 1 or more")
        if self.tokenizer_width < 1 or self.tokenizer_width % NORM_GROUPS:
            raise ValueError(f"tokenizer_width is {self.tokenizer_width}; it must be a multiple of {NORM_GROUPS}")
        Scales(self.patch_nums)  # refuses what is no schedule
        self._refuse_settings_without_effect()

    def _refuse_settings_without_effect(self) -> None:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        for name in changed if self.what == "suite" else ():
            if name not in SETTINGS_OF_SUITE:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but suite chooses it for each of its benchmarks; "
                    f"it takes {', '.join(SETTINGS_OF_SUITE[1:])}: leave it out, or name one benchmark"
                )
        if self.batches and self.what != "sample":
            raise ValueError(f"batches is {list(self.batches)}, which only sample takes, not {self.what}; use batch")
        if self.contestants == OURS and (self.what != "train" or self.against):
            raise ValueError("contestants is ours, which is for train without against; leave one of them out")
