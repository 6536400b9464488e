"""Memory per GPU of a training step, by component, as arithmetic: what `--dry-run` prints before anything is allocated.

The components do not all exist at once. So a step is followed from moment to moment: at the loss there are all
activations and the logits with their gradient, in the backward pass fewer activations and more gradients, at the end
the buckets that reduce gradients. The peak is that of the worst moment.

Not counted: the frozen tokenizer, the CUDA context, the buffers of NCCL and cuBLAS, and what the caching allocator
loses to fragments.
"""

from __future__ import annotations

from bisect import bisect_left
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
from training.planning.zero_memory import (
    BACKWARD,
    LOSS,
    REDUCTION,
    RESTING,
    UPDATE,
    Moment,
    Sizes,
    block_elements,
    zero_memory,
)


@dataclass(frozen=True)
class MemoryEstimate:
    """The moments of a step, and what stays between two steps."""

    resting: Moment
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def worst(self, name: str) -> Moment:
        """Return the largest of the moments of this name."""
        return max((moment for moment in self.moments if moment.name == name), key=lambda moment: moment.total)


def estimate_memory(
    model: VARConfig, engine: EngineConfig, world_size: int, *, averages: bool = False
) -> MemoryEstimate:
    """Estimate the memory of one GPU out of `world_size` that trains the transformer of stage 2.

    averages: the optimizer keeps a moving average of the weights (optimizer.ema_decay).
    """
    sizes = Sizes(model, engine, world_size, averages)
    batch, kept, block = engine.micro_batch, kept_by_block(model, engine), block_elements(model)
    forward = batch * (model.depth * kept + saved_by_ends(model, engine))
    moments = [replace(zero_memory(sizes, LOSS), activations=forward, logits=loss_bytes(model, engine))]
    current = batch * (recomputed_by_block(model, engine) + backward_of_block(model, engine))
    for left in range(model.depth, 0, -1):  # blocks whose backward pass is not over
        held = zero_memory(sizes, BACKWARD, done=model.num_parameters - left * block)
        moments.append(replace(held, activations=batch * left * kept + current))
    moments += [zero_memory(sizes, REDUCTION), zero_memory(sizes, UPDATE)]
    return MemoryEstimate(zero_memory(sizes, RESTING), tuple(moments))


def largest_micro_batch(
    model: VARConfig, engine: EngineConfig, world_size: int, memory_bytes: float, *, averages: bool = False
) -> int:
    """Return the most images per GPU whose predicted peak is at most `memory_bytes`; 0 if not even one fits."""

    def fits(images: int) -> bool:
        wanted = replace(engine, micro_batch=images)
        return estimate_memory(model, wanted, world_size, averages=averages).peak.total <= memory_bytes

    too_many = 1
    while fits(too_many):
        too_many *= 2
    return bisect_left(range(too_many), True, key=lambda images: images > 0 and not fits(images)) - 1
