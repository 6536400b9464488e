"""The step's model: what must grow grows, what cannot be hidden is not, and no share exceeds one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.var import VARConfig
from training.engine.engine import EngineConfig
from training.flops import training_flops
from training.planning.step_time import ClusterConfig, StepTime, step_time

MODEL, CLUSTER = VARConfig(depth=24), ClusterConfig()


def modelled(ranks: int = 8, cluster: ClusterConfig = CLUSTER, **engine: object) -> StepTime:
    return step_time(MODEL, EngineConfig(**engine), cluster, ranks)


def test_computation_is_exact_flops_at_the_attainable_rate() -> None:
    expected = training_flops(MODEL) * 16 / (CLUSTER.matmul_tflops * 1e12 * CLUSTER.attainable_share)
    assert modelled(micro_batch=16).compute == pytest.approx(expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_gpu_sends_nothing_and_many_never_beat_their_share(stage: int) -> None:
    assert modelled(1, zero_stage=stage).communication == 0
    found = [modelled(ranks, zero_stage=stage) for ranks in (1, 8, 64)]
    busy = [each.total - each.optimizer for each in found]  # the optimiser's work is divided, so it may shrink
    assert busy[0] < busy[1] <= busy[2]


@pytest.mark.parametrize("ranks", [8, 64])
def test_what_is_in_the_open_is_a_part_of_what_is_sent(ranks: int) -> None:
    for stage in (1, 2, 3):
        found = modelled(ranks, zero_stage=stage)
        assert 0 <= found.exposed <= found.communication
        assert 0 < found.mfu <= CLUSTER.attainable_share
    assert modelled(ranks, zero_stage=1).exposed == modelled(ranks, zero_stage=1).communication  # it is not overlapped


def test_slower_links_make_slower_steps() -> None:
    slow = replace(CLUSTER, link_gb_per_second=10.0, node_gb_per_second=10.0)
    assert modelled(8, slow, zero_stage=3).total > modelled(8, zero_stage=3).total


def test_recomputation_costs_a_third_where_it_is_whole_and_less_where_it_is_not() -> None:
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
