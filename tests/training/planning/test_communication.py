"""What ZeRO is said to send is what two ranks really send."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from fork_world import ForkServer

from launchers.bench.memory import BACKWARD_END, FORWARD_END
from models.var import ADALN, LAYER_NORM, SHARED_ADALN, VARConfig
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.planning.activations import number_bytes
from training.planning.communication import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Transfer, transfers
from training.planning.gathering import Gathering, gathering

Case = tuple[VARConfig, EngineConfig, int]  # and elements that ZeRO-3 may keep gathered
Counted = dict[str, dict[str, dict[str, int]]]  # by part of a step, and by collective: bytes and calls
NOTHING = {"bytes": 0, "calls": 0}
NAMES = {ALL_REDUCE: "allreduce_", ALL_GATHER: "_allgather_base_", REDUCE_SCATTER: "_reduce_scatter_base_"}


def case(depth: int, stage: int, *, live: int = LIVE_ELEMENTS, norm: str = ADALN, **engine: Any) -> Case:
    model = VARConfig(depth=depth, patch_nums=(1, 2, 3), vocab_size=64, norm=norm)
    sizes = {"micro_batch": 1, "reduce_bucket_size": 10**6, "prefetch_bucket_size": 10**6, "precision": "fp32"}
    return model, EngineConfig(zero_stage=stage, **(sizes | engine)), live


CASES = [
    case(2, 0),
    case(2, 1),
    case(2, 1, precision="bf16"),
    case(2, 2, precision="bf16"),
    case(4, 3),
    case(4, 3, precision="bf16", persistence_threshold=1000),
    case(4, 3, live=5 * 10**5, persistence_threshold=1000),
    case(4, 3, live=25 * 10**5, prefetch_bucket_size=4 * 10**5, activation_checkpointing="full"),
    case(4, 3, live=25 * 10**5, persistence_threshold=1000, activation_checkpointing="full", norm=SHARED_ADALN),
    case(4, 3, live=1, persistence_threshold=0, activation_checkpointing="selective", norm=LAYER_NORM),
    case(6, 3, live=4 * 10**6, persistence_threshold=1000, prefetch_bucket_size=2 * 10**6),
]


def test_a_ring_sends_a_payload_once_or_twice() -> None:
    assert Transfer(ALL_GATHER, "after", 100, 1).sent_bytes(4) == 75
    assert Transfer(ALL_REDUCE, "after", 100, 1).sent_bytes(4) == 150


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_weights_are_gathered_and_all_gradients_reduced(stage: int) -> None:
    model = VARConfig(depth=8)
    sent = transfers(model, EngineConfig(zero_stage=stage, persistence_threshold=0), accumulation=1)
    by_kind = {kind: sum(each.payload for each in sent if each.kind == kind) for kind in (ALL_GATHER, ALL_REDUCE)}
    reduced = by_kind[ALL_REDUCE] + sum(each.payload for each in sent if each.kind == REDUCE_SCATTER)
    assert reduced >= 2 * model.num_parameters and by_kind[ALL_GATHER] >= 2 * model.num_parameters


@pytest.mark.slow
def test_two_ranks_send_what_is_said(fork_server: ForkServer) -> None:
    for (model, engine, live), counted in zip(CASES, count_sent(fork_server), strict=True):
        if live == LIVE_ELEMENTS:
            said = transfers(model, engine, accumulation=1)
            for kind, name in NAMES.items():
                found = sum(sent.get(name, NOTHING)["bytes"] for sent in counted.values())
                payload = sum(each.payload for each in said if each.kind == kind)
                assert found == pytest.approx(payload, rel=0.001, abs=64)  # up to padding, norms and flags
        if engine.zero_stage == 3:
            check_gathering(counted, gathering(model, engine, live), bytes_of_number=number_bytes(engine))
        assert not {name for sent in counted.values() for name in sent} - set(NAMES.values())


def count_sent(fork_server: ForkServer) -> list[Counted]:
    cases = [{"model": asdict(model), "engine": asdict(engine), "live_elements": live} for model, engine, live in CASES]
    world = fork_server.run("memory_worker:count_sent", {"cases": cases}, world_size=2, timeout=300)
    assert world.exit_codes == [0, 0], world.explain()
    return world.results[0]


def check_gathering(counted: Counted, said: Gathering, *, bytes_of_number: int) -> None:
    for name, gathered in ((FORWARD_END, said.forward), (BACKWARD_END, said.backward)):
        found = counted[name].get(NAMES[ALL_GATHER], NOTHING)
        assert found["calls"] == gathered.calls
        assert found["bytes"] == pytest.approx(bytes_of_number * gathered.elements, rel=0.001)  # up to padding
