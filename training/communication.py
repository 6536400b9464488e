"""What ZeRO sends in one optimiser step, as DeepSpeed 0.19.8 does it: which collectives, how many bytes, when.

Two things differ from the usual account. Stages 1 and 2 all-reduce the gradients, although each rank needs its share
only: twice the bytes of a reduce-scatter. And stage 3 gathers a block once for both passes if it stays gathered in
between (training/zero_memory.py). tests/test_communication.py counts what two ranks really send.

Symbols: n parameters, W ranks, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from models.var import VARConfig
from training.activations import number_bytes
from training.engine import EngineConfig
from training.zero_memory import (
    PLAIN_BUCKET,
    block_elements,
    block_shapes,
    kept_elements,
    other_shapes,
    persistent_elements,
)

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
PASSES = {ALL_REDUCE: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1}  # how often a ring sends a payload's (W - 1) / W
FORWARD, BACKWARD, AFTER = "forward", "backward", "after"
DECAY_GROUPS = 2  # of the optimiser; each is gathered by a call of its own


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in one step. `payload` is the size in bytes of what is whole: gathered, or to reduce."""

    kind: str
    when: str  # FORWARD or BACKWARD: beside the computation, if DeepSpeed overlaps it; AFTER: when it is over
    payload: int
    calls: int

    def sent_bytes(self, ranks: int) -> float:
        """What each rank sends in a ring."""
        return PASSES[self.kind] * self.payload * (ranks - 1) / ranks


def transfers(model: VARConfig, engine: EngineConfig, accumulation: int) -> list[Transfer]:
    """All that one optimiser step of `accumulation` micro-batches sends, at any number of ranks above one.

    Stages 0 and 1 reduce once a step; stages 2 and 3 with every micro-batch. Only stage 3 overlaps.
    """
    whole = number_bytes(engine) * model.num_parameters
    if engine.zero_stage == 3:
        return _sharded(model, engine, accumulation)
    plain = engine.zero_stage == 0 or (engine.zero_stage, engine.precision) == (1, "bf16")
    bucket = PLAIN_BUCKET if plain else engine.reduce_bucket_size
    times = accumulation if engine.zero_stage == 2 else 1
    sent = [Transfer(ALL_REDUCE, AFTER, times * whole, times * ceil(model.num_parameters / bucket))]
    return sent + ([Transfer(ALL_GATHER, AFTER, whole, DECAY_GROUPS)] if engine.zero_stage else [])


def _sharded(model: VARConfig, engine: EngineConfig, accumulation: int) -> list[Transfer]:
    e, persistent = number_bytes(engine), persistent_elements(model, engine)
    kept = kept_elements(model, engine)
    again = model.depth * block_elements(model) - sum(kept)
    chunks = ceil(model.num_parameters / min(engine.prefetch_bucket_size, model.num_parameters))
    reduced = ceil(model.num_parameters / engine.reduce_bucket_size)
    small = [prod(shape) for shape in model.depth * block_shapes(model) + other_shapes(model)]
    num_small = sum(size <= engine.persistence_threshold for size in small)
    sent = [
        Transfer(ALL_GATHER, FORWARD, accumulation * e * (model.num_parameters - persistent), accumulation * chunks),
        Transfer(ALL_GATHER, BACKWARD, accumulation * e * again, accumulation * kept.count(0)),
        Transfer(REDUCE_SCATTER, BACKWARD, accumulation * e * model.num_parameters, accumulation * reduced),
        Transfer(ALL_GATHER, AFTER, e * persistent, num_small),
    ]
    return [transfer for transfer in sent if transfer.payload]
