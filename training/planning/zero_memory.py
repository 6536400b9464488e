"""What DeepSpeed's ZeRO holds on one GPU: weights, gradients, optimiser, buckets, and when which of them exist.

Read off DeepSpeed 0.19.8, since it is not what the figure of the ZeRO paper suggests:

- stage 1 in bf16 has an optimiser of its own (runtime/bf16_optimizer.py). It keeps the gradients of all parameters in
  float32 on every rank at all times, beside the bf16 ones of the step, and `reduce_bucket_size` means nothing to it;
- every stage above 0 keeps a float32 copy of this rank's weights, in float32 training too;
- a bucket is flattened before it is reduced, so that it exists twice (runtime/zero/stage_1_and_2.py);
- stage 3 keeps most blocks gathered from their forward to their backward pass (training/planning/gathering.py): a model of up to
  LIVE_ELEMENTS parameters is whole on every GPU at the loss.

Symbols: n parameters, W ranks, p = n / W rounded up, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Protocol

from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.planning.activations import FLOAT32, number_bytes
from training.planning.gathering import Gathering, gathering
from training.planning.parameter_shapes import block_elements, tensor_elements

MOMENTS = 2  # of AdamW
PLAIN_BUCKET = 500_000_000  # elements reduced at once where no ZeRO optimiser does it (runtime/engine.py)
NORM = 8  # bytes of a number while the gradient's norm is taken
SUB_GROUP = 1_000_000_000  # elements that stage 3 updates at once


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU at one moment."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0


class ZeroMemory(Protocol):
    """What one kind of optimiser holds. `done` counts the elements whose gradients the backward pass has computed."""

    def resting(self) -> Held: ...  # between two steps, and in the forward pass

    def loss(self) -> Held: ...  # at the end of the forward pass

    def backward(self, block: int, done: int) -> Held: ...

    def reduction(self) -> Held: ...  # when the last gradients are reduced

    def update(self) -> Held: ...


@dataclass(frozen=True)
class Shares:
    """The numbers that all kinds need."""

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
    def bucket(self) -> int:
        return self.engine.reduce_bucket_size

    @property
    def states(self) -> int:
        """float32 numbers that AdamW keeps of one parameter, without the weight itself."""
        return MOMENTS + self.averages

    @property
    def optimizer(self) -> int:
        """Of this rank's share, with its float32 weights."""
        return FLOAT32 * (1 + self.states) * self.p


def zero_memory(model: VARConfig, engine: EngineConfig, ranks: int, *, averages: bool) -> ZeroMemory:
    """What the optimiser that DeepSpeed takes for this stage and precision holds."""
    shares = Shares(model, engine, ranks, averages)
    if engine.zero_stage == 0:
        return Replicated(shares)
    if engine.zero_stage == 3:
        return Sharded(shares)
    return AllGradients(shares) if engine.is_reduced_by_the_engine else Partitions(shares)


@dataclass(frozen=True)
class Replicated:
    """Stage 0, float32: the model's own tensors; several ranks flatten gradients into one more copy to reduce them."""

    shares: Shares

    def resting(self) -> Held:
        s = self.shares
        return Held(s.e * s.n, 0, FLOAT32 * s.states * s.n)

    def loss(self) -> Held:
        return self.resting()

    def backward(self, block: int, done: int) -> Held:
        return self._with(gradients=self.shares.e * done)

    def reduction(self) -> Held:
        s = self.shares
        return self._with(gradients=s.e * s.n, buckets=s.e * min(s.n, PLAIN_BUCKET) if s.ranks > 1 else 0)

    def update(self) -> Held:
        return self._with(gradients=self.shares.e * self.shares.n)

    def _with(self, *, gradients: int, buckets: int = 0) -> Held:
        held = self.resting()
        return Held(held.weights, gradients, held.optimizer, buckets)


@dataclass(frozen=True)
class AllGradients:
    """Stage 1 in bf16: gradients of all parameters in float32 at all times, and in bf16 until the update is done."""

    shares: Shares

    def resting(self) -> Held:
        s = self.shares
        return Held(s.e * s.n, FLOAT32 * s.n, s.optimizer)

    def loss(self) -> Held:
        return self.resting()

    def backward(self, block: int, done: int) -> Held:
        s = self.shares
        return Held(s.e * s.n, FLOAT32 * s.n + s.e * done, s.optimizer)

    def reduction(self) -> Held:
        """The decayed group alone is a bucket if it exceeds PLAIN_BUCKET; else both groups are flattened first."""
        s = self.shares
        if s.ranks == 1:
            return self.update()
        copies = s.e if s.n > PLAIN_BUCKET else FLOAT32 + s.e
        return Held(s.e * s.n, (FLOAT32 + s.e) * s.n, s.optimizer, copies * s.n)

    def update(self) -> Held:
        return self.backward(0, self.shares.n)


@dataclass(frozen=True)
class Partitions:
    """Stages 1 and 2 otherwise: flat weights, a bucket to reduce through, gradients of this rank's share."""

    shares: Shares

    def resting(self) -> Held:
        s = self.shares
        return Held(s.e * s.n, 0, s.optimizer)

    def loss(self) -> Held:
        return self.resting()

    def backward(self, block: int, done: int) -> Held:
        """Stage 1 reduces at the end and gathers float32 gradients until then; stage 2 whenever a bucket is full."""
        s = self.shares
        if s.engine.zero_stage == 1:
            return self._with(FLOAT32 * done, FLOAT32 * s.bucket)
        if done < s.bucket:
            return self._with(0, s.e * s.bucket)
        return self._with(FLOAT32 * s.p, 2 * s.e * s.bucket)

    def reduction(self) -> Held:
        s = self.shares
        filled = min(s.n, s.bucket)
        if s.engine.zero_stage == 2:
            return self._with(FLOAT32 * s.p, s.e * (s.bucket + filled))
        casts = 0 if s.engine.precision == "fp32" else s.e * filled
        return self._with(FLOAT32 * (s.n - filled + s.p), FLOAT32 * (s.bucket + filled) + casts)

    def update(self) -> Held:
        """First the norm, tensor by tensor in float64; then, in float32, the share's gradients in one flat copy."""
        s = self.shares
        norm = NORM * min(s.p, max(tensor_elements(s.model)))
        flat = FLOAT32 * s.p if s.engine.precision == "fp32" else 0
        return self._with(FLOAT32 * s.p, max(norm, flat))

    def _with(self, gradients: int, buckets: int) -> Held:
        held = self.resting()
        return Held(held.weights, gradients, held.optimizer, buckets)


@dataclass(frozen=True)
class Sharded:
    """Stage 3: a share of everything, the bucket at all times, and the blocks that are gathered at the moment."""

    shares: Shares

    def resting(self) -> Held:
        s = self.shares
        whole = persistent_elements(s.model, s.engine) if s.ranks > 1 else 0  # one rank's share is the whole
        return Held(s.e * (s.p + whole), FLOAT32 * s.p, s.optimizer, s.e * s.bucket)

    def loss(self) -> Held:
        return self._with(gathered=self._gathering.at_loss)

    def backward(self, block: int, done: int) -> Held:
        """A leaf's gradients go to the bucket together, once its backward pass is over."""
        s = self.shares
        current = block_elements(s.model)
        fetched = current if self._gathering.is_block_gathered_again[block] else 0  # the buffer it came in, beside it
        flushed = min(s.bucket, done) if done + current > s.bucket else 0
        return self._with(gathered=self._gathering.at_block[block] + fetched, leaf=current, flushed=flushed)

    def reduction(self) -> Held:
        return self._with(flushed=min(self.shares.bucket, self.shares.n))

    def update(self) -> Held:
        s, held = self.shares, self.resting()
        flat = FLOAT32 * min(s.p, SUB_GROUP)
        return Held(held.weights, held.gradients + flat, held.optimizer, held.buckets)

    @property
    def _gathering(self) -> Gathering:
        return gathering(self.shares.model, self.shares.engine)

    def _with(self, *, gathered: int = 0, leaf: int = 0, flushed: int = 0) -> Held:
        s, held = self.shares, self.resting()
        weights = held.weights + (s.e * gathered if s.ranks > 1 else 0)
        casts = 0 if s.engine.precision == "fp32" else FLOAT32 * ceil(flushed / s.ranks)
        buckets = held.buckets + s.e * flushed + casts
        return Held(weights, held.gradients + s.e * leaf, held.optimizer, buckets)


def persistent_elements(model: VARConfig, engine: EngineConfig) -> int:
    """Parameters in tensors that ZeRO-3 leaves whole on every rank, being no larger than the threshold."""
    return sum(size for size in tensor_elements(model) if size <= engine.persistence_threshold)
