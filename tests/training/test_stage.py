"""Both stages are what the loop expects of a stage."""

from __future__ import annotations

import inspect

import pytest

from training.stage import Stage
from training.tokenizer_loop import TokenizerStage
from training.var_loop import VARStage

METHODS = ("train_step", "window_metrics", "validate", "headline")


@pytest.mark.parametrize("stage", [VARStage, TokenizerStage])
@pytest.mark.parametrize("method", METHODS)
def test_a_stage_takes_what_the_loop_gives(stage: type, method: str) -> None:
    wanted, got = inspect.signature(getattr(Stage, method)), inspect.signature(getattr(stage, method))
    assert list(got.parameters) == list(wanted.parameters)


@pytest.mark.parametrize("stage", [VARStage, TokenizerStage])
def test_a_stage_has_the_numbers_that_the_loop_records(stage: type) -> None:
    source = inspect.getsource(stage.__init__)
    for name in ("engines", "flops_per_image", "tokens_per_image"):
        assert f"self.{name}" in source
