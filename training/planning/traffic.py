"""Bytes that our own code moves between memory and processor, as arithmetic, to be set against a bandwidth.

Each tensor that is kept counts once where it is written and once where it is read, as if all between were fused: more
is moved in truth. Other code keeps other tensors: these are no limits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.sampling import num_doubled_scales
from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.flops import block_weights, modulation_weights
from training.planning.activations import kept_by_block, logit_bytes, number_bytes, saved_by_ends
from training.planning.step_time import optimizer_bytes


def training_bytes(model: VARConfig, engine: EngineConfig) -> float:
    """Of one step of `engine.micro_batch` images on one rank.

    Weights are read in the forward and in the backward pass, and their gradients written; what is kept for the backward
    pass, logits included, is written and read; then comes the optimiser.
    """
    weights = 3 * number_bytes(engine) * model.num_parameters
    kept = model.depth * kept_by_block(model, engine) + saved_by_ends(model, engine) + logit_bytes(model, engine)
    optimizer = optimizer_bytes(model, engine, 1, accumulation=1, averages=False)
    return weights + 2 * engine.micro_batch * kept + optimizer


def generation_bytes(config: VARConfig, guidance: Sequence[float], *, batch: int, bytes_per_number: int) -> int:
    """Of drawing the codes of `batch` images together, with guidance of these strengths at the K scales.

    The weights that act on tokens are read at every scale, those of AdaLN once. Keys and values are written once, and
    read at every scale from then on; twice as many while the unconditional half runs, see models/generation.py.
    """
    scales, width, depth = config.scales, config.width, config.depth
    on_tokens = block_weights(config) + width * config.vocab_size
    weights = scales.num_scales * on_tokens + modulation_weights(config)
    halves = [2 if k < num_doubled_scales(guidance) else 1 for k in range(scales.num_scales)]
    written = sum(half * size for half, size in zip(halves, scales.scale_sizes, strict=True))
    read = sum(half * part.stop for half, part in zip(halves, scales.slices, strict=True))
    cache = 2 * depth * width * (written + read)  # keys and values
    return bytes_per_number * (weights + batch * cache)
