"""Memory per GPU of a training step, by component, as arithmetic: what `--dry-run` prints before anything is allocated.

A step is followed from moment to moment, since its components do not all exist at once: at the loss all activations
and the logits with their gradient, in the backward pass fewer activations and more gradients, at the end gradients and
the buffers that reduce them. The peak is that of the worst moment. Activations are counted from the architecture
(training/planning/activations.py), the rest from what DeepSpeed allocates (training/planning/zero_memory.py). `benchmark.py memory` sets
the predictions beside measured peaks.

Not in it: the frozen tokenizer, the CUDA context and the buffers of NCCL and cuBLAS, and what the caching allocator
loses to fragments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.planning.activations import (
    backward_of_block,
    kept_by_block,
    loss_bytes,
    recomputed_by_block,
    saved_by_ends,
)
from training.planning.parameter_shapes import block_elements, end_elements
from training.planning.zero_memory import Held, zero_memory

LOSS, BACKWARD, REDUCTION, UPDATE = "loss", "backward pass", "reduction of gradients", "update"


@dataclass(frozen=True)
class Moment:
    """Bytes on one GPU at one moment of a step, by component."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buckets: int

    @property
    def components(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if name != "name"}

    @property
    def total(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """All moments of a step, and what stays between two."""

    resting: Moment
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def worst(self, name: str) -> Moment:
        """The largest of the moments of this name."""
        return max((moment for moment in self.moments if moment.name == name), key=lambda moment: moment.total)


def estimate_memory(
    model: VARConfig, engine: EngineConfig, world_size: int, *, averages: bool = False
) -> MemoryEstimate:
    """Memory of one GPU out of `world_size` for the transformer of stage 2.

    averages: the optimiser keeps a moving average of the weights (optimizer.ema_decay).
    """
    states = zero_memory(model, engine, world_size, averages=averages)
    kept, batch = kept_by_block(model, engine), engine.micro_batch
    forward = batch * (model.depth * kept + saved_by_ends(model, engine))
    moments = [_moment(LOSS, states.loss(), forward, loss_bytes(model, engine))]
    worst_block = batch * (recomputed_by_block(model, engine) + backward_of_block(model, engine))
    size, ends = block_elements(model), end_elements(model)
    for block in reversed(range(model.depth)):
        done = ends + (model.depth - 1 - block) * size
        moments.append(_moment(BACKWARD, states.backward(block, done), batch * (block + 1) * kept + worst_block))
    moments += [_moment(REDUCTION, states.reduction()), _moment(UPDATE, states.update())]
    return MemoryEstimate(_moment("between steps", states.resting()), tuple(moments))


def _moment(name: str, held: Held, activations: int = 0, logits: int = 0) -> Moment:
    return Moment(name, held.weights, held.gradients, held.optimizer, activations, logits, held.buckets)


def largest_micro_batch(
    model: VARConfig, engine: EngineConfig, world_size: int, memory_bytes: float, *, averages: bool = False
) -> int:
    """The most images per GPU whose predicted peak is at most `memory_bytes`; 0 if not even one fits."""

    def fits(images: int) -> bool:
        wanted = replace(engine, micro_batch=images)
        return estimate_memory(model, wanted, world_size, averages=averages).peak.total <= memory_bytes

    if not fits(1):
        return 0
    enough, too_many = 1, 2
    while fits(too_many):
        enough, too_many = too_many, 2 * too_many
    while too_many - enough > 1:
        middle = (enough + too_many) // 2
        enough, too_many = (middle, too_many) if fits(middle) else (enough, middle)
    return enough
