"""What each ZeRO stage of DeepSpeed keeps on one GPU, in closed form: weights, gradients, optimizer states, buckets.

The ZeRO paper's figure (weights, gradients and optimizer states divided by the ranks in turn) is not what DeepSpeed
allocates. Each function below says what its stage keeps, and when in a step.

Symbols: n parameters, W ranks, p = n / W rounded up, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from models.var import VAR, VARConfig
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.planning.activations import FLOAT32, number_bytes

RESTING, LOSS, BACKWARD = "between steps", "loss", "backward pass"
REDUCTION, UPDATE = "reduction of gradients", "update"
FLOAT64 = 8
ADAMW_MOMENTS = 2
PLAIN_BUCKET = 500_000_000  # elements that DeepSpeed's engine reduces at once where no ZeRO optimizer does it
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at once


@dataclass(frozen=True)
class Moment:
    """Bytes on one GPU at one moment of a step, by component."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0  # through which gradients are reduced
    activations: int = 0
    logits: int = 0

    @property
    def components(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if name != "name"}

    @property
    def total(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class Sizes:
    """The numbers that the formulas of all stages are made of."""

    model: VARConfig
    engine: EngineConfig
    ranks: int
    averages: bool  # an exponential moving average of the weights is kept

    @property
    def n(self) -> int:
        return self.model.num_parameters

    @property
    def p(self) -> int:
        return ceil(self.n / self.ranks)

    @property
    def e(self) -> int:
        return number_bytes(self.engine)

    @property
    def is_low(self) -> bool:
        return self.engine.precision != "fp32"

    @property
    def states(self) -> int:
        """Count the bytes of AdamW's moments of one parameter, and of its moving average."""
        return FLOAT32 * (ADAMW_MOMENTS + self.averages)

    @property
    def update_copy(self) -> int:
        """Count the bytes of the largest copy of gradients in an update of stages 1 and 2.

        DeepSpeed takes their norm tensor by tensor in float64, and flattens this rank's share if it is in float32.
        """
        norm = FLOAT64 * min(self.p, max(tensor_sizes(self.model)))
        return norm if self.is_low else max(norm, FLOAT32 * self.p)


@lru_cache(maxsize=32)
def tensor_sizes(model: VARConfig) -> tuple[int, ...]:
    """Return the number of elements of each parameter of the model, which is built without memory."""
    with torch.device("meta"):
        return tuple(parameter.numel() for parameter in VAR(model).parameters())


@lru_cache(maxsize=32)
def block_elements(model: VARConfig) -> int:
    """Return the number of parameters of one transformer block."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VAR(model).blocks[0].parameters())


def persistent_sizes(model: VARConfig, engine: EngineConfig) -> list[int]:
    """Return the sizes of the tensors that stage 3 leaves whole on every rank, being no larger than the threshold."""
    return [size for size in tensor_sizes(model) if size <= engine.persistence_threshold]


def zero_memory(sizes: Sizes, name: str, done: int = 0) -> Moment:
    """Return what ZeRO holds at the moment `name`, one of the five above, without activations and logits.

    done: in the backward pass, the number of parameters whose gradients are computed.
    """
    formulas = {0: _stage_0, 1: _stage_1, 2: _stage_2, 3: _stage_3}
    formula = formulas[sizes.engine.zero_stage]
    if sizes.engine.zero_stage == 1 and sizes.engine.precision == "bf16":
        formula = _stage_1_in_bf16
    return formula(sizes, name, sizes.n if name in (REDUCTION, UPDATE) else done)


def _stage_0(s: Sizes, name: str, done: int) -> Moment:
    """Keep everything whole: e n weights, e n gradients, the moments of all. Precision is float32, without a copy.

    Several ranks copy the gradients into one flat bucket to reduce them.
    """
    bucket = s.e * min(s.n, PLAIN_BUCKET) if name == REDUCTION and s.ranks > 1 else 0
    return Moment(name, s.e * s.n, s.e * done, s.states * s.n, bucket)


def _stage_1_in_bf16(s: Sizes, name: str, done: int) -> Moment:
    """Divide the optimizer alone: float32 weights and moments of p. DeepSpeed has a class of its own for this case.

    Every rank keeps gradients of all n in float32 at all times, beside those in bf16 from the backward pass on.
    Several ranks reduce flat copies: both kinds where one bucket takes all parameters, else those in bf16.
    """
    copies = s.e if s.n > PLAIN_BUCKET else FLOAT32 + s.e
    bucket = copies * s.n if name == REDUCTION and s.ranks > 1 else 0
    return Moment(name, s.e * s.n, FLOAT32 * s.n + s.e * done, (FLOAT32 + s.states) * s.p, bucket)


def _stage_1(s: Sizes, name: str, done: int) -> Moment:
    """Divide the optimizer: float32 weights, in float32 training too, and moments of p.

    Gradients of all n are kept in float32 until the backward pass is over. Then they are reduced bucket by bucket, and
    p remain. A bucket is flattened before it is reduced, so that it exists twice.
    """
    bucket = s.engine.reduce_bucket_size
    filled = min(s.n, bucket)
    casts = s.e * filled if s.is_low else 0
    gradients, buckets = 0, 0
    if name == BACKWARD:
        gradients, buckets = FLOAT32 * done, FLOAT32 * bucket
    elif name == REDUCTION:
        gradients, buckets = FLOAT32 * (s.n - filled + s.p), FLOAT32 * (bucket + filled) + casts
    elif name == UPDATE:
        gradients, buckets = FLOAT32 * s.p, s.update_copy
    return Moment(name, s.e * s.n, gradients, (FLOAT32 + s.states) * s.p, buckets)


def _stage_2(s: Sizes, name: str, done: int) -> Moment:
    """Divide optimizer and gradients: these are reduced whenever a bucket is full, and kept in float32 of p alone."""
    bucket = s.engine.reduce_bucket_size
    gradients, buckets = 0, 0
    if name == BACKWARD and done < bucket:
        buckets = s.e * bucket
    elif name in (BACKWARD, REDUCTION):
        gradients, buckets = FLOAT32 * s.p, s.e * (bucket + min(s.n, bucket))
    elif name == UPDATE:
        gradients, buckets = FLOAT32 * s.p, s.update_copy
    return Moment(name, s.e * s.n, gradients, (FLOAT32 + s.states) * s.p, buckets)


def _stage_3(s: Sizes, name: str, done: int) -> Moment:
    """Divide everything: weights, float32 gradients and optimizer of p. One bucket is there at all times.

    On several ranks weights are whole from their forward to their backward pass, at most LIVE_ELEMENTS and one block.
    The gradients of a block go to the bucket together.
    """
    block, bucket = block_elements(s.model), s.engine.reduce_bucket_size
    whole = sum(persistent_sizes(s.model, s.engine))
    if name in (LOSS, BACKWARD):
        whole = min(s.n - done, LIVE_ELEMENTS + block)
    flushed = {
        BACKWARD: min(bucket, done) if done + block > bucket else 0,
        REDUCTION: min(bucket, s.n),
    }.get(name, 0)
    gradients = {BACKWARD: s.e * block, UPDATE: FLOAT32 * min(s.p, SUB_GROUP)}.get(name, 0)
    return Moment(
        name,
        weights=s.e * (s.p + (whole if s.ranks > 1 else 0)),  # one rank's share is the whole
        gradients=FLOAT32 * s.p + gradients,
        optimizer=(FLOAT32 + s.states) * s.p,
        buckets=s.e * (bucket + flushed) + (FLOAT32 * ceil(flushed / s.ranks) if s.is_low else 0),
    )
