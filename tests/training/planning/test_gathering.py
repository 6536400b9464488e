"""ZeRO-3 gathers every weight once for the forward pass, and for the backward pass what it has released."""

from __future__ import annotations

from itertools import product

import pytest

from models.var import CHECKPOINTINGS, NORMS, VARConfig
from training.engine.engine import LIVE_ELEMENTS, EngineConfig
from training.planning.gathering import gathering
from training.planning.zero_memory import persistent_elements

MODEL = VARConfig(depth=8)


def engine(**settings: int | str) -> EngineConfig:
    return EngineConfig(zero_stage=3, **{"prefetch_bucket_size": 2_000_000} | settings)


@pytest.mark.parametrize("norm,way", list(product(NORMS, CHECKPOINTINGS)))
def test_the_forward_pass_gathers_all_but_what_is_whole_anyway(norm: str, way: str) -> None:
    model, settings = VARConfig(depth=8, norm=norm), engine(activation_checkpointing=way)
    for live in (1, 10**7, LIVE_ELEMENTS):
        gathered = gathering(model, settings, live).forward.elements
        assert gathered == model.num_parameters - persistent_elements(model, settings)


def test_a_model_within_the_limit_is_gathered_once_and_whole_at_the_loss() -> None:
    found = gathering(MODEL, engine())
    assert found.backward.elements == 0 and not any(found.is_block_gathered_again)
    assert found.at_loss == found.forward.elements


def test_the_less_may_be_gathered_the_more_is_gathered_again() -> None:
    again = [gathering(MODEL, engine(), live).backward.elements for live in (1, 10**7, 2 * 10**7, 10**9)]
    assert again == sorted(again, reverse=True) and again[0] > 0.7 * MODEL.num_parameters


def test_what_is_whole_stays_near_the_limit() -> None:
    for live in (10**7, 2 * 10**7):
        found = gathering(MODEL, engine(), live)
        assert max(found.at_loss, *found.at_block) < live + 10**7  # a block has 4.7 million


def test_first_blocks_are_gathered_again_and_last_ones_not() -> None:
    again = gathering(MODEL, engine(), 2 * 10**7).is_block_gathered_again
    assert again[0] and not again[-1] and list(again) == sorted(again, reverse=True)


def test_a_larger_bucket_takes_fewer_calls() -> None:
    small, large = (gathering(MODEL, engine(prefetch_bucket_size=size)).forward for size in (10**6, 10**8))
    assert small.elements == large.elements and small.calls > large.calls


def test_tensors_below_the_threshold_are_never_gathered() -> None:
    found = gathering(MODEL, engine(persistence_threshold=10**9))
    assert (found.forward.calls, found.backward.calls, found.at_loss) == (0, 0, 0)
