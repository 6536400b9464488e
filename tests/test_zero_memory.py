"""The shapes that ZeRO's memory is counted from are those of the model."""

from __future__ import annotations

from math import prod

import pytest

from models.var import NORMS, VAR, VARConfig
from training.engine import EngineConfig
from training.zero_memory import (
    block_elements,
    block_shapes,
    end_elements,
    kept_elements,
    other_shapes,
    persistent_elements,
)

SIZES = {"depth": 2, "patch_nums": (1, 2, 3), "vocab_size": 32, "code_width": 6, "num_classes": 5}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_shapes_are_those_of_the_parameters(norm: str, qk_norm: bool) -> None:
    config = VARConfig(**SIZES, norm=norm, qk_norm=qk_norm)
    found = sorted(prod(parameter.shape) for parameter in VAR(config).parameters())
    assert found == sorted(prod(shape) for shape in 2 * block_shapes(config) + other_shapes(config))
    assert 2 * block_elements(config) + end_elements(config) == config.num_parameters


def test_small_tensors_stay_whole_under_zero_3() -> None:
    config = VARConfig(**SIZES)
    all_of_it, nothing = (
        persistent_elements(config, EngineConfig(zero_stage=3, persistence_threshold=threshold))
        for threshold in (10**9, 0)
    )
    assert (all_of_it, nothing) == (config.num_parameters, 0)


def test_small_models_stay_gathered_between_the_passes_and_large_ones_in_part() -> None:
    small, large = VARConfig(depth=4), VARConfig(depth=36)
    engine = EngineConfig(zero_stage=3)
    assert all(kept_elements(small, engine))
    kept = kept_elements(large, engine)
    assert not kept[0] and kept[-1]  # the last block's backward pass follows its forward pass at once
