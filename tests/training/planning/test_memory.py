"""Memory per GPU: predicted peaks are those of real steps, and ZeRO and checkpointing save what they should."""

from __future__ import annotations

from typing import Any

import pytest
from fork_world import ForkServer

from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.planning.memory import LOSS, UPDATE, MemoryEstimate, estimate_memory, largest_micro_batch

MODEL = VARConfig(depth=16)
RANKS = 4
SHORT = (1, 2, 3, 4, 5, 6)  # 91 tokens: float32 at 680 tokens is among the cases, bf16 is slow on many CPUs
NARROW = {"patch_nums": (1, 2, 3), "vocab_size": 64}  # weights are most of what there is
BUCKETS = {"reduce_bucket_size": 1_000_000, "prefetch_bucket_size": 1_000_000}


def case(
    depth: int, batch: int, stage: int, precision: str, mode: str = "none", *, ema_decay: float = 0, **model: Any
) -> dict[str, Any]:
    engine = {"zero_stage": stage, "precision": precision, "micro_batch": batch, "activation_checkpointing": mode}
    made = {"model": {"depth": depth, "patch_nums": SHORT} | model, "engine": engine | BUCKETS}
    return made | ({"ema_decay": ema_decay} if ema_decay else {})


ONE_RANK = {
    "d2, stage 0": case(2, 4, 0, "fp32"),
    "d2, stage 2, bf16, selective": case(2, 4, 2, "bf16", "selective"),
    "d4, 2 images of 680 tokens": case(4, 2, 1, "fp32", patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "d4, stage 0": case(4, 8, 0, "fp32"),
    "d4, stage 1, bf16, with an average": case(4, 8, 1, "bf16", ema_decay=0.9),
    "d4, stage 2, bf16, selective": case(4, 8, 2, "bf16", "selective"),
    "d4, stage 3, bf16, full": case(4, 8, 3, "bf16", "full"),
    "d6, stage 1, full, few codes": case(6, 8, 1, "fp32", "full", vocab_size=64),
    "d6, stage 3, plain layer norm": case(6, 4, 3, "fp32", norm="layer_norm"),
    "d6, stage 0, most of it weights": case(6, 2, 0, "fp32", **NARROW),
    "d8, stage 3, selective": case(8, 4, 3, "fp32", "selective", norm="shared_adaln"),
}
QUICK = ("d2, stage 0", "d2, stage 2, bf16, selective")  # the others take three minutes
TWO_RANKS = {
    "d6, stage 0": case(6, 2, 0, "fp32", **NARROW),
    "d6, stage 1": case(6, 2, 1, "fp32", **NARROW),
    "d6, all gathered": case(6, 2, 3, "fp32", **NARROW),
    "d6, all gathered, bf16": case(6, 2, 3, "bf16", **NARROW),
    "d6, part of it gathered": case(6, 2, 3, "fp32", **NARROW) | {"live_elements": 4_000_000},
    "d6, part of it gathered, full": case(6, 2, 3, "fp32", "full", **NARROW) | {"live_elements": 4_000_000},
}


def compare(fork_server: ForkServer, cases: dict[str, Any], *, ranks: int) -> dict[str, dict[str, dict[str, int]]]:
    world = fork_server.run("memory_worker:compare_all", {"cases": list(cases.values())}, world_size=ranks, timeout=480)
    assert world.exit_codes == ranks * [0], world.explain()
    return dict(zip(cases, world.results[0], strict=True))


def test_predicted_peaks_are_within_a_tenth_of_measured_ones(fork_server: ForkServer) -> None:
    for name, step in compare(fork_server, {name: ONE_RANK[name] for name in QUICK}, ranks=1).items():
        assert step["predicted"]["peak"] == pytest.approx(step["measured"]["peak"], rel=0.1), name


@pytest.mark.slow
def test_every_part_of_a_step_on_one_rank_is_within_a_tenth(fork_server: ForkServer) -> None:
    for name, step in compare(fork_server, ONE_RANK, ranks=1).items():
        for part, size in step["predicted"].items():
            assert size == pytest.approx(step["measured"][part], rel=0.1), f"{name}: {part}"


@pytest.mark.slow
def test_peaks_of_two_ranks_which_gather_weights_are_within_a_tenth(fork_server: ForkServer) -> None:
    for name, step in compare(fork_server, TWO_RANKS, ranks=2).items():
        assert step["predicted"]["peak"] == pytest.approx(step["measured"]["peak"], rel=0.1), name


@pytest.mark.gpu
def test_peaks_on_a_gpu_are_within_a_tenth(fork_server: ForkServer) -> None:
    cases = {
        f"d16, stage {stage}, {mode}": {
            "model": {"depth": 16},
            "engine": {"zero_stage": stage, "micro_batch": 32, "activation_checkpointing": mode} | BUCKETS,
        }
        for stage in (1, 3)
        for mode in ("none", "selective", "full")
    }
    for name, step in compare(fork_server, cases, ranks=1).items():
        assert step["predicted"]["peak"] == pytest.approx(step["measured"]["peak"], rel=0.1), name


def estimate(ranks: int = RANKS, **engine: Any) -> MemoryEstimate:
    return estimate_memory(MODEL, EngineConfig(**engine), ranks)


def test_stages_take_less_from_one_to_the_next_on_many_ranks() -> None:
    resting = [estimate(64, zero_stage=stage, micro_batch=1).resting.total for stage in (1, 2, 3)]
    assert resting == sorted(resting, reverse=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_checkpointing_reduces_activations_and_nothing_else(precision: str) -> None:
    modes = ("none", "selective", "full")
    kept = {mode: estimate(precision=precision, activation_checkpointing=mode) for mode in modes}
    moments = [estimate.worst(LOSS) for estimate in kept.values()]
    assert moments[0].activations > 2 * moments[1].activations > 4 * moments[2].activations
    assert len({moment.total - moment.activations for moment in moments}) == 1
    assert len({estimate.worst(UPDATE).total for estimate in kept.values()}) == 1


def test_activations_grow_with_the_micro_batch_and_do_not_shrink_with_ranks() -> None:
    one, eight = (estimate(micro_batch=images).worst(LOSS).activations for images in (1, 8))
    assert eight == 8 * one
    assert estimate(1).worst(LOSS).activations == estimate(64).worst(LOSS).activations


def test_the_peak_is_the_largest_moment_and_the_total_the_sum_of_its_parts() -> None:
    found = estimate(zero_stage=3)
    assert found.peak.total == max(moment.total for moment in found.moments)
    assert found.peak.total == sum(found.peak.components.values())
    assert set(found.peak.components) == {"weights", "gradients", "optimizer", "activations", "logits", "buckets"}


@pytest.mark.parametrize("gib", [24, 80])
def test_the_largest_micro_batch_fits_and_one_more_does_not(gib: int) -> None:
    engine, memory = EngineConfig(zero_stage=1), gib * 2**30
    images = largest_micro_batch(MODEL, engine, 8, memory)
    fitting, too_large = (estimate(8, micro_batch=number).peak.total for number in (images, images + 1))
    assert fitting <= memory < too_large


def test_no_micro_batch_fits_where_the_model_does_not() -> None:
    assert largest_micro_batch(MODEL, EngineConfig(zero_stage=1), 8, 2**30) == 0
