"""launchers/train.py: a dry run says what a run would need, before anything is there and without allocating it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import VAR_CONFIG, Study, command

from launchers import train


def test_a_dry_run_of_training_says_what_it_needs_and_reads_one_batch(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    train.launch(command(study.train_config(), dry_run=True, world_size=2))
    said = capsys.readouterr().out
    assert f"parameters          {VAR_CONFIG.num_parameters:,}\n" in said
    assert "2 x 2 images x 1 accumulated" in said
    assert "one batch of codes (2, 5)" in said
    assert "checkpointing       selective: " in said and "step, modelled" in said
    assert not Path(study.train_config().run).exists()


def test_a_dry_run_needs_neither_tokenizer_nor_data(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    train.launch(command(replace(study.train_config(), tokenizer="nowhere"), dry_run=True))
    assert "not there yet: nowhere" in capsys.readouterr().out


def test_a_dry_run_refuses_a_batch_that_cannot_be_split(study: Study) -> None:
    with pytest.raises(ValueError, match="global_batch 4 is not divisible by the world size 3"):
        train.launch(command(study.train_config(), dry_run=True, world_size=3))


@pytest.mark.parametrize("kind", ["codes", "images"])
def test_a_dry_run_says_that_it_leaves_out_the_encoding_of_images(
    study: Study, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train.launch(command(study.train_config(kind=kind), dry_run=True))
    assert ("not modelled" in capsys.readouterr().out) == (kind == "images")
