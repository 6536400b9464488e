"""The model of a step: bytes by ZeRO stage, what must grow grows, what cannot be hidden is not."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from fork_world import ForkServer

from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.flops import training_flops
from training.planning.step_time import (
    AFTER,
    ALL_GATHER,
    ALL_REDUCE,
    BACKWARD,
    FORWARD,
    REDUCE_SCATTER,
    ClusterConfig,
    StepTime,
    Transfer,
    hidden_seconds,
    optimizer_bytes,
    step_time,
    transfers,
)

MODEL, CLUSTER = VARConfig(depth=24), ClusterConfig()
N = MODEL.num_parameters
SENT_NAMES = {ALL_REDUCE: "allreduce_", ALL_GATHER: "_allgather_base_", REDUCE_SCATTER: "_reduce_scatter_base_"}


def modelled(ranks: int = 8, cluster: ClusterConfig = CLUSTER, **engine: Any) -> StepTime:
    return step_time(MODEL, EngineConfig(**engine), cluster, ranks)


def test_computation_is_exact_flops_at_the_attainable_rate() -> None:
    expected = training_flops(MODEL) * 16 / (CLUSTER.matmul_tflops * 1e12 * CLUSTER.attainable_share)
    assert modelled(micro_batch=16).compute == pytest.approx(expected)


@pytest.mark.parametrize(
    "engine, expected",
    [
        ({"zero_stage": 0, "precision": "fp32"}, {(ALL_REDUCE, AFTER): 4 * N}),
        ({"zero_stage": 1}, {(ALL_REDUCE, AFTER): 2 * N, (ALL_GATHER, AFTER): 2 * N}),
        ({"zero_stage": 2}, {(ALL_REDUCE, AFTER): 3 * 2 * N, (ALL_GATHER, AFTER): 2 * N}),
        (
            {"zero_stage": 3, "persistence_threshold": 0},
            {
                (ALL_GATHER, FORWARD): 3 * 2 * N,
                (ALL_GATHER, BACKWARD): 3 * 2 * (N - 10**9),  # what is beyond LIVE_ELEMENTS comes again
                (REDUCE_SCATTER, BACKWARD): 3 * 2 * N,
                (ALL_GATHER, AFTER): 0,
            },
        ),
    ],
)
def test_bytes_sent_are_those_of_the_stage(engine: dict[str, Any], expected: dict[tuple[str, str], int]) -> None:
    sent = transfers(MODEL, EngineConfig(**engine), accumulation=3)
    assert {(transfer.kind, transfer.when): transfer.payload for transfer in sent} == expected


def test_a_transfer_takes_the_bytes_of_a_ring_and_a_latency_for_each_doubling_of_the_ranks() -> None:
    cluster = replace(CLUSTER, link_gb_per_second=1.0, node_gb_per_second=0.5, latency_microseconds=1000.0)
    gathered, reduced = (Transfer(kind, AFTER, 10**9, calls=2) for kind in (ALL_GATHER, ALL_REDUCE))
    assert gathered.seconds(cluster, 4) == pytest.approx(0.75 + 2 * 0.002)
    assert reduced.seconds(cluster, 4) == pytest.approx(1.5 + 2 * 0.002)
    assert gathered.seconds(cluster, 16) == pytest.approx(15 / 16 / 0.5 + 2 * 0.004)  # over the slower links of nodes


@pytest.mark.slow
def test_two_ranks_send_the_bytes_that_are_said(fork_server: ForkServer) -> None:
    model = VARConfig(depth=4, patch_nums=(1, 2, 3), vocab_size=64)
    sizes = {"micro_batch": 1, "reduce_bucket_size": 10**6, "prefetch_bucket_size": 10**6}
    engines = [
        EngineConfig(zero_stage=stage, precision=precision, persistence_threshold=threshold, **sizes)
        for stage, precision, threshold in (
            (0, "fp32", 0),
            (1, "fp32", 0),
            (1, "bf16", 0),
            (2, "bf16", 0),
            (3, "fp32", 100_000),
            (3, "bf16", 1000),
        )
    ]
    cases = [{"model": asdict(model), "engine": asdict(engine)} for engine in engines]
    world = fork_server.run("memory_worker:count_sent", {"cases": cases}, world_size=2, timeout=300)
    assert world.exit_codes == [0, 0], world.explain()
    for engine, counted in zip(engines, world.results[0], strict=True):
        said = transfers(model, engine, accumulation=1)
        for kind, name in SENT_NAMES.items():
            payload = sum(each.payload for each in said if each.kind == kind)
            assert counted.pop(name, 0) == pytest.approx(payload, rel=0.001, abs=64), engine  # padding, norms and flags
        assert not counted


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_sends_nothing_and_many_never_beat_their_share(stage: int) -> None:
    assert modelled(1, zero_stage=stage).communication == 0
    found = [modelled(ranks, zero_stage=stage) for ranks in (1, 8, 64)]
    busy = [each.total - each.optimizer for each in found]  # the optimizer's work is divided, so it may shrink
    assert busy[0] < busy[1] <= busy[2]


@pytest.mark.parametrize("ranks", [8, 64])
def test_only_stage_3_hides_communication_and_never_more_than_there_is(ranks: int) -> None:
    for stage in (1, 2, 3):
        found = modelled(ranks, zero_stage=stage)
        assert 0 <= found.exposed <= found.communication and 0 < found.mfu <= CLUSTER.attainable_share
        assert (found.exposed < found.communication) == (stage == 3)


def test_a_third_of_the_computation_can_hide_what_the_forward_pass_sends() -> None:
    endless = {when: [Transfer(ALL_GATHER, when, 10**15, calls=1)] for when in (FORWARD, BACKWARD, AFTER)}
    hidden = [hidden_seconds(sent, 9.0, replace(CLUSTER, overlap_share=0.5), 8) for sent in endless.values()]
    assert hidden == pytest.approx([1.5, 3.0, 0.0])


def test_slower_links_make_slower_steps() -> None:
    slow = replace(CLUSTER, link_gb_per_second=10.0, node_gb_per_second=10.0)
    assert modelled(8, slow, zero_stage=3).total > modelled(8, zero_stage=3).total


@pytest.mark.parametrize(
    "engine, accumulation, averages, expected",
    [
        ({"zero_stage": 0, "precision": "fp32"}, 1, False, (28 + 12) * N),
        ({"zero_stage": 3}, 5, True, (28 + 6 + 12 + 12) * N / 8),
        ({"zero_stage": 1}, 5, False, (28 + 6) * N / 8 + (12 + 4 + 12 + 5 * 10) * N),
    ],
)
def test_the_optimizer_moves_the_bytes_of_its_share(
    engine: dict[str, Any], accumulation: int, averages: bool, expected: float
) -> None:
    moved = optimizer_bytes(MODEL, EngineConfig(**engine), 8, accumulation=accumulation, averages=averages)
    assert moved == pytest.approx(expected)


def test_a_step_waits_for_data_that_comes_slower_than_it_computes() -> None:
    slow = replace(CLUSTER, loaded_per_second=10.0)
    found = [step_time(MODEL, EngineConfig(micro_batch=20), slow, 1, workers=workers) for workers in (1, 2, 1000)]
    assert [each.total for each in found[:2]] == pytest.approx([2.0, 1.0]) and found[2].data_wait == 0


def test_recomputation_costs_a_third_where_it_is_full_and_less_where_it_is_selective() -> None:
    none, selective, full = (
        modelled(activation_checkpointing=way).recomputation for way in ("none", "selective", "full")
    )
    assert none == 0 < selective < full < modelled().compute / 3
    compiled = [modelled(activation_checkpointing=way, compile=True).recomputation for way in ("selective", "full")]
    assert compiled == [full, full]


@pytest.mark.parametrize("name", ["gpu_memory_gib", "matmul_tflops", "link_gb_per_second"])
def test_a_cluster_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"cluster.{name} is 0"):
        ClusterConfig(**{name: 0})
    with pytest.raises(ValueError, match="is a share"):
        ClusterConfig(overlap_share=1.5)
