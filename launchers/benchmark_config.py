"""The config of launchers/benchmark.py: what is measured, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field

from launchers.config import refuse_unknown
from models.attention import ATTENTIONS, PER_SCALE
from models.scales import PATCH_NUMS_256
from training.engine import PRECISIONS

BENCHMARKS = ("train", "switches", "sample", "tokenizer", "data", "attention", "memory", "suite")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """launchers/benchmark.py: what is measured, and on what. `what` may be given without its name."""

    what: str = field(metadata={"is_bare": True})  # one of BENCHMARKS
    folder: str = ""  # data: packed data to read; empty: made for the purpose
    depth: int = 8  # of the transformer
    patch_nums: tuple[int, ...] = PATCH_NUMS_256
    tokenizer_width: int = 160  # that of the released one
    batch: int = 4  # images at once
    batches: tuple[int, ...] = ()  # sample: more batch sizes
    precision: str = "fp32"  # or bf16 or fp16
    compile: bool = False  # compile the transformer's blocks
    attention: str = PER_SCALE  # of training: or flex, or masked
    against: str = ""  # a clone of the public VAR code to measure beside; empty: none
    repeats: int = 7
    out: str = ""  # a .json file for the figures; empty: none

    def __post_init__(self) -> None:
        refuse_unknown(BENCHMARKS, what=self.what)
        refuse_unknown(PRECISIONS, precision=self.precision)
        refuse_unknown(ATTENTIONS, attention=self.attention)
        for name in ("repeats", "batch", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
