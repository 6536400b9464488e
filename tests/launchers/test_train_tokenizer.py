"""launchers/train_tokenizer.py: its dry run, and the engines that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import VQVAE_CONFIG, Study, command, make_tokenizer

from launchers import train_tokenizer
from launchers.train_tokenizer import TokenizerConfig
from training.engine.engine import EngineConfig


def test_a_dry_run_of_the_tokenizer_reads_one_batch(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.train_config(kind="images")
    settings = TokenizerConfig(run="r", model=VQVAE_CONFIG, data=config.data, engine=config.engine, loop=config.loop)
    train_tokenizer.launch(command(settings, dry_run=True))
    said = capsys.readouterr().out
    assert f"parameters          {sum(p.numel() for p in make_tokenizer().parameters()):,}\n" in said
    assert "tokens per image    5" in said and "one batch of images (2, 3, 8, 8)" in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precision": "bf16"}, "engine.precision is bf16"),
        ({"zero_stage": 3}, "engine.zero_stage is 3"),
        ({"activation_checkpointing": "full"}, "engine.activation_checkpointing is full"),
        ({"compile": True}, "engine.compile is True"),
    ],
)
def test_an_engine_that_does_not_fit_the_tokenizer_is_refused(change: dict[str, Any], message: str) -> None:
    fitting = {"precision": "fp32", "zero_stage": 2}
    train_tokenizer.refuse_unfit_engine(EngineConfig(**fitting))
    with pytest.raises(ValueError, match=message):
        train_tokenizer.refuse_unfit_engine(EngineConfig(**(fitting | change)))
