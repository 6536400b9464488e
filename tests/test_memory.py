"""Memory per GPU: ZeRO's partitioning (Rajbhandari et al. 2020, Fig. 1) and what checkpointing saves."""

from __future__ import annotations

import pytest

from models.var import VARConfig
from training.engine import EngineConfig
from training.memory import MemoryEstimate, estimate_memory

MODEL = VARConfig(depth=16)
RANKS = 4


def estimate(ranks: int = RANKS, **engine: object) -> MemoryEstimate:
    return estimate_memory(MODEL, EngineConfig(**engine), ranks)


@pytest.mark.parametrize(
    "stage, shares",
    [(0, (1, 1, 1)), (1, (1, 1, RANKS)), (2, (1, RANKS, RANKS)), (3, (RANKS, RANKS, RANKS))],
)
def test_each_stage_divides_one_more_state_by_the_ranks(stage: int, shares: tuple[int, int, int]) -> None:
    alone, spread = estimate(1, zero_stage=stage, precision="fp32"), estimate(zero_stage=stage, precision="fp32")
    for name, share in zip(("weights", "gradients", "optimizer"), shares, strict=True):
        assert getattr(spread, name) == getattr(alone, name) // share, name


def test_mixed_precision_takes_two_four_and_twelve_bytes_a_parameter() -> None:
    alone, number = estimate(1, zero_stage=1, precision="bf16"), MODEL.num_parameters
    assert alone.weights == 2 * number
    assert alone.gradients == 4 * number  # accumulated in float32
    assert alone.optimizer == 12 * number  # float32 master copy and AdamW's two moments


def test_float32_without_zero_has_no_master_copy() -> None:
    alone, number = estimate(1, zero_stage=0, precision="fp32"), MODEL.num_parameters
    assert (alone.weights, alone.gradients, alone.optimizer) == (4 * number, 4 * number, 8 * number)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_checkpointing_reduces_activations_and_nothing_else(precision: str) -> None:
    plain = estimate(precision=precision)
    checkpointed = estimate(precision=precision, activation_checkpointing="full")
    assert checkpointed.activations < plain.activations / 2
    assert plain.total - checkpointed.total == plain.activations - checkpointed.activations


def test_activations_grow_with_the_micro_batch_and_do_not_shrink_with_ranks() -> None:
    assert estimate(micro_batch=8).activations == 8 * estimate(micro_batch=1).activations
    assert estimate(1).activations == estimate(64).activations


def test_the_total_is_the_sum_of_the_parts() -> None:
    parts = estimate(zero_stage=3)
    assert parts.total == parts.weights + parts.gradients + parts.optimizer + parts.activations + parts.buckets
