"""The shapes that memory and messages are counted from are those of the model."""

from __future__ import annotations

from math import prod

import pytest

from models.var import NORMS, VAR, VARConfig
from training.planning.parameter_shapes import block_elements, block_shapes, end_elements, end_shapes, tensor_elements

SIZES = {"depth": 2, "patch_nums": (1, 2, 3), "vocab_size": 32, "code_width": 6, "num_classes": 5}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_shapes_are_those_of_the_parameters_in_their_order(norm: str, qk_norm: bool) -> None:
    config = VARConfig(**SIZES, norm=norm, qk_norm=qk_norm)
    model = VAR(config)
    assert [tuple(parameter.shape) for parameter in model.blocks[1].parameters()] == block_shapes(config)
    for name, shapes in end_shapes(config).items():
        own = model.get_submodule(name).parameters(recurse=False)
        assert [tuple(parameter.shape) for parameter in own] == shapes, name


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_is_left_out(norm: str) -> None:
    config = VARConfig(**SIZES, norm=norm)
    found = sorted(prod(parameter.shape) for parameter in VAR(config).parameters())
    assert found == sorted(tensor_elements(config))
    assert 2 * block_elements(config) + end_elements(config) == config.num_parameters
