"""launchers/synthesize_codes.py: codes that train.py reads unchanged, and the entropy that no model can beat."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import ROOT
from tiny import command, train_var
from workers import content

from data_pipeline.loading.datasets import CodeDataset
from launchers import synthesize_codes
from launchers.setup.config_files import load_config
from launchers.setup.loading import load_tokenizer
from launchers.setup.settings import DataConfig, TrainConfig
from launchers.study.config import StudyConfig
from launchers.study.tree_source import TreeSource, TreeSourceConfig
from launchers.synthesize_codes import SynthesizeConfig
from models.generation import check_configs_agree
from models.var import VARConfig
from models.vqvae import VQVAE
from training.engine.engine import EngineConfig
from training.loop_config import LoopConfig
from training.optim import OptimizerConfig
from training.tracking.record import TrackingConfig

CONFIGS = ROOT / "configs" / "synthetic"
SOURCE = TreeSourceConfig(patch_nums=(1, 2), vocab_size=4, num_classes=3, zipf=2.0)


def settings(out: Path) -> SynthesizeConfig:
    return SynthesizeConfig(out=str(out), source=SOURCE, train=600, validation=80, code_width=8, samples_per_shard=250)


def synthesize(config: SynthesizeConfig) -> Path:
    synthesize_codes.launch(command(config))
    return Path(config.out)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(settings(tmp_path_factory.mktemp("synthetic")))


def test_equal_settings_give_equal_bytes_and_once_is_enough(made: Path, tmp_path: Path) -> None:
    assert content(synthesize(settings(tmp_path))) == content(made)
    synthesize(settings(tmp_path))  # all is there
    assert content(tmp_path) == content(made)


@pytest.mark.parametrize("change", [{"train": 601}, {"source": replace(SOURCE, zipf=1.0)}, {"code_width": 4}])
def test_other_settings_are_not_taken_for_what_is_there(made: Path, change: dict) -> None:
    before = content(made)
    with pytest.raises(ValueError, match="delete"):
        synthesize(replace(settings(made), **change))
    assert content(made) == before


def test_source_json_says_what_the_source_loses_on_the_images_that_are_stored(made: Path) -> None:
    facts, source = json.loads((made / "source.json").read_text()), TreeSource(SOURCE)
    _, sha256 = load_tokenizer(str(made / "tokenizer"))
    stored = CodeDataset(made / "val", patch_nums=(1, 2), vocab_size=4, tokenizer_sha256=sha256)
    codes, labels = (part.numpy() for part in stored.read(np.arange(80), np.zeros(80, np.int64)))
    assert facts["validation_loss"] == pytest.approx(source.loss(codes, labels).tolist(), rel=1e-12)
    assert facts["entropy"] == pytest.approx(source.entropy().tolist(), rel=1e-12)
    assert facts["entropy_last"] == facts["entropy"][-1]
    assert facts["entropy_avg"] == pytest.approx((facts["entropy"][0] + 4 * facts["entropy"][1]) / 5)
    assert facts["validation_loss_last"] == pytest.approx(facts["entropy_last"], abs=0.01)  # they are typical
    assert facts["validation_loss_avg"] == pytest.approx(facts["entropy_avg"], abs=0.01)


def validation_losses(made: Path, run: Path) -> list[float]:
    """One epoch of fresh images by launchers/train.py's own parts: loss_avg at each evaluation, in nats."""
    config = TrainConfig(
        run=str(run),
        tokenizer=str(made / "tokenizer"),
        model=VARConfig(depth=1, patch_nums=(1, 2), vocab_size=4, code_width=8, num_classes=3),
        data=DataConfig(train=str(made / "train"), validation=str(made / "val"), workers=0),
        optimizer=OptimizerConfig(base_lr=6.0),  # of the plain gradient descent here
        engine=EngineConfig(zero_stage=0, precision="fp32", micro_batch=20),
        loop=LoopConfig(global_batch=20, epochs=1.0, validate_every=1.0),
        tracking=TrackingConfig(mlflow=False),
        label_drop=0.0,
    )
    train_var(config)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss_avg"] for record in records if record["kind"] == "validation"]


def test_a_transformer_learns_them_and_stays_above_the_entropy(made: Path, tmp_path: Path) -> None:
    losses = validation_losses(made, tmp_path / "run")
    least = json.loads((made / "source.json").read_text())["validation_loss_avg"]
    assert least < min(losses)
    assert losses[-1] - least < (math.log(4) - least) / 2  # an untrained one loses ln V


def test_a_transformer_that_sees_what_it_predicts_goes_below_the_entropy(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound would show a leak: here each token of the second scale is the input of its own position."""

    def leak(tokenizer: VQVAE, codes: torch.Tensor) -> torch.Tensor:
        return tokenizer.quantizer.codebook[codes[:, 1:]]

    monkeypatch.setattr(VQVAE, "teacher_forcing_inputs", leak)
    least = json.loads((made / "source.json").read_text())["validation_loss_avg"]
    assert min(validation_losses(made, tmp_path / "run")) < least


def test_the_configs_of_the_embedded_study_fit_together() -> None:
    source = load_config(SynthesizeConfig, str(CONFIGS / "source.yaml"))
    study = load_config(StudyConfig, str(CONFIGS / "scaling_study.yaml"))
    assert study.known_entropy == f"{source.out}/source.json" and len(study.sizes) >= 6
    for name, file in study.names().items():
        size = load_config(TrainConfig, str(CONFIGS.parent.parent / file))
        check_configs_agree(size.model, source.tokenizer)
        assert size.model.num_classes == source.source.num_classes
        assert name == f"d{size.model.depth}"
        assert (size.data.train, size.data.validation) == (f"{source.out}/train", f"{source.out}/val")
        assert size.tokenizer == f"{source.out}/tokenizer"
        assert size.loop.epochs <= 1  # every image is new


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("validation", 0), ("code_width", 0), ("seed", -1)])
def test_impossible_settings_are_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        SynthesizeConfig(out="o", **{name: value})
