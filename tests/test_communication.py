"""What ZeRO is said to send is what two ranks really send."""

from __future__ import annotations

from typing import Any

import pytest
from fork_world import ForkServer

from models.var import VARConfig
from training.communication import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Transfer, transfers
from training.engine import EngineConfig

MODEL = {"depth": 2, "patch_nums": (1, 2, 3), "vocab_size": 64}
ENGINES = [
    {"zero_stage": stage, "precision": "fp32", "micro_batch": 2, "reduce_bucket_size": 10**6,
     "prefetch_bucket_size": 10**6} for stage in (1, 2)
]


def test_a_ring_sends_a_payload_once_or_twice() -> None:
    assert Transfer(ALL_GATHER, "after", 100, 1).sent_bytes(4) == 75
    assert Transfer(ALL_REDUCE, "after", 100, 1).sent_bytes(4) == 150


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_weights_are_gathered_and_all_gradients_reduced(stage: int) -> None:
    model = VARConfig(depth=8)
    sent = transfers(model, EngineConfig(zero_stage=stage, persistence_threshold=0), 1)
    by_kind = {kind: sum(each.payload for each in sent if each.kind == kind) for kind in (ALL_GATHER, ALL_REDUCE)}
    reduced = by_kind[ALL_REDUCE] + sum(each.payload for each in sent if each.kind == REDUCE_SCATTER)
    assert reduced >= 2 * model.num_parameters and by_kind[ALL_GATHER] >= 2 * model.num_parameters


@pytest.mark.slow
def test_two_ranks_send_what_is_said(fork_server: ForkServer) -> None:
    world = fork_server.run("memory_worker:count_sent", {"model": MODEL, "engines": ENGINES}, world_size=2, timeout=300)
    assert world.exit_codes == [0, 0], world.explain()
    for engine, counted in zip(ENGINES, world.results[0], strict=True):
        check(counted, transfers(VARConfig(**MODEL), EngineConfig(**engine), 1))


def check(counted: dict[str, int], sent: list[Transfer]) -> None:
    said: dict[str, Any] = {kind: sum(each.payload for each in sent if each.kind == kind) for kind in NAMES}
    for kind, name in NAMES.items():
        assert counted[name] == pytest.approx(said[kind], rel=0.05), (counted, said)


NAMES = {ALL_REDUCE: "all_reduce", ALL_GATHER: "all_gather_into_tensor", REDUCE_SCATTER: "reduce_scatter_tensor"}
