"""Memory per GPU of a training step, by component, as arithmetic: what `--dry-run` prints before anything is allocated.

Weights, gradients and optimiser are counted from the precision and the ZeRO stage. Activations are an estimate: 34
bytes per token, width and block in 16-bit precision, the usual count for a GPT block without stored attention scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from models.var import NO_CHECKPOINTING, VARConfig
from training.engine import EngineConfig

ACTIVATION_BYTES = {"fp32": 68, "bf16": 34, "fp16": 34}  # per token, width and block
LOGIT_BYTES = 12  # per token and code: logits, their float32 copy, and its gradient


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buckets: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def estimate_memory(model: VARConfig, engine: EngineConfig, world_size: int) -> MemoryEstimate:
    """Memory of one GPU out of `world_size` for the transformer of stage 2; the frozen tokenizer is not in it."""
    stage, number = engine.zero_stage, model.num_parameters
    low = engine.precision != "fp32"
    weights = (2 if low else 4) * number // (world_size if stage == 3 else 1)
    gradients = 4 * number // (world_size if stage >= 2 else 1)  # accumulated in float32
    has_master = low or stage > 0  # DeepSpeed's ZeRO keeps a flat float32 copy in float32 training too
    optimizer = (12 if has_master else 8) * number // (world_size if stage >= 1 else 1)
    bucket = engine.reduce_bucket_size * (2 if low else 4) * 2 if stage > 0 else 0
    return MemoryEstimate(weights, gradients, optimizer, _activations(model, engine), bucket)


def _activations(model: VARConfig, engine: EngineConfig) -> int:
    tokens = model.scales.num_tokens
    block = ACTIVATION_BYTES[engine.precision] * tokens * model.width
    kept = (2 if engine.precision != "fp32" else 4) * tokens * model.width * model.depth + block
    blocks = kept if engine.activation_checkpointing != NO_CHECKPOINTING else block * model.depth
    return engine.micro_batch * (blocks + LOGIT_BYTES * tokens * model.vocab_size)
