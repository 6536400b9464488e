"""What ZeRO sends in one optimiser step, as DeepSpeed 0.19.8 does it: which collectives, how many bytes, when.

Two things differ from the usual account. Stages 1 and 2 all-reduce the gradients, although each rank needs its share
only: twice the bytes of a reduce-scatter. And stage 3 gathers most blocks once for both passes
(training/planning/gathering.py). tests/training/planning/test_communication.py counts what two ranks really send.

Calls that reduce are those of full buckets, the fewest there can be: a bucket is sent before a tensor overfills it.

Symbols: n parameters, W ranks, e bytes of a number in the engine's precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.planning.activations import number_bytes
from training.planning.gathering import gathering
from training.planning.parameter_shapes import tensor_elements
from training.planning.zero_memory import PLAIN_BUCKET, persistent_elements

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

    def times(self, number: int) -> Transfer:
        return replace(self, payload=number * self.payload, calls=number * self.calls)

    def sent_bytes(self, ranks: int) -> float:
        """What each rank sends in a ring."""
        return PASSES[self.kind] * self.payload * (ranks - 1) / ranks


def transfers(model: VARConfig, engine: EngineConfig, *, accumulation: int) -> list[Transfer]:
    """All that one optimiser step of `accumulation` micro-batches sends, at any number of ranks above one.

    Stages 0 and 1 reduce once a step; stages 2 and 3 with every micro-batch. Only stage 3 overlaps.
    """
    whole = number_bytes(engine) * model.num_parameters
    if engine.zero_stage == 3:
        return _sharded(model, engine, accumulation)
    bucket = PLAIN_BUCKET if engine.is_reduced_by_the_engine else engine.reduce_bucket_size
    times = accumulation if engine.zero_stage == 2 else 1
    sent = [Transfer(ALL_REDUCE, AFTER, times * whole, times * ceil(model.num_parameters / bucket))]
    return sent + ([Transfer(ALL_GATHER, AFTER, whole, DECAY_GROUPS)] if engine.zero_stage else [])


def _sharded(model: VARConfig, engine: EngineConfig, accumulation: int) -> list[Transfer]:
    e, persistent = number_bytes(engine), persistent_elements(model, engine)
    gathered = gathering(model, engine)
    reduced = ceil(model.num_parameters / engine.reduce_bucket_size)
    num_persistent = sum(size <= engine.persistence_threshold for size in tensor_elements(model))
    sent = [
        Transfer(ALL_GATHER, FORWARD, e * gathered.forward.elements, gathered.forward.calls).times(accumulation),
        Transfer(ALL_GATHER, BACKWARD, e * gathered.backward.elements, gathered.backward.calls).times(accumulation),
        Transfer(REDUCE_SCATTER, BACKWARD, e * model.num_parameters, reduced).times(accumulation),
        Transfer(ALL_GATHER, AFTER, e * persistent, num_persistent),
    ]
    return [transfer for transfer in sent if transfer.payload]
