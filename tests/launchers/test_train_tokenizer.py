"""launchers/train_tokenizer.py: its dry run, and the engines that it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import VQVAE_CONFIG, Study, command, make_tokenizer

from launchers import train_tokenizer
from launchers.train_tokenizer import TokenizerConfig
from training.engine.engine import EngineConfig
from training.losses import ReconstructionLossConfig


def test_a_dry_run_of_the_tokenizer_reads_one_batch(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = study.train_config(kind="images")
    loss = ReconstructionLossConfig(lpips_weight=0, adversarial_weight=0)
    settings = TokenizerConfig(
        run="r", model=VQVAE_CONFIG, data=config.data, engine=config.engine, loop=config.loop, loss=loss
    )
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


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_discriminator_that_starts_later_is_tried_before_the_first_step(
    study: Study, dry_run: bool, tmp_path: Path
) -> None:
    """Images of 8 pixels are too small for it; the run would have found that out when the adversarial term starts."""
    config = study.train_config(kind="images")
    loss = ReconstructionLossConfig(lpips_weight=0, adversarial_weight=0.5, adversarial_start=0.9)
    settings = TokenizerConfig(
        run=str(tmp_path / "r"), model=VQVAE_CONFIG, data=config.data, engine=config.engine, loop=config.loop, loss=loss
    )
    with pytest.raises(ValueError, match="discriminator.num_layers is 3, too many for images of 8 pixels"):
        train_tokenizer.launch(command(settings, dry_run=dry_run))
    assert not (tmp_path / "r").exists()
