"""launchers/sample.py: an image depends on its seed, class and number, and on nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import VAR_CONFIG, VQVAE_CONFIG, Study, command, make_tokenizer, train_var

from launchers import sample
from launchers.config import SampleConfig
from models.var import VAR
from training.checkpoint import describe, write_model


def test_labels_come_class_by_class() -> None:
    config = SampleConfig(run="r", per_class=2)
    assert sample.sample_labels(config, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample.sample_labels(replace(config, classes=(2, 0)), 3).tolist() == [2, 2, 0, 0]
    assert sample.sample_labels(config, 3).dtype == np.int64


@pytest.mark.parametrize("label", [-1, 3])
def test_a_class_that_the_model_does_not_know_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=f"classes has {label}; this model knows 0 to 2"):
        sample.sample_labels(SampleConfig(run="r", classes=(0, label)), 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_class": 0}, "per_class is 0; accepted: 1 to 65536"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1; accepted: 0 to 64"),
        ({"seed": 65}, "seed is 65; accepted: 0 to 64"),
    ],
)
def test_settings_that_cannot_be_sampled_are_refused(change: dict[str, Any], message: str) -> None:
    sample.refuse_unusable(SampleConfig(run="r", seed=64), 1000)
    with pytest.raises(ValueError, match=message):
        sample.refuse_unusable(replace(SampleConfig(run="r"), **change), 1000)


def test_the_greatest_seed_is_one_that_torch_keeps_whole() -> None:
    last = sample.image_seeds(64, np.array([999]), np.array([sample.MAX_PER_CLASS - 1]), 1000)
    assert last[0] < 2**32 <= sample.image_seeds(65, np.array([999]), np.array([sample.MAX_PER_CLASS - 1]), 1000)[0]


def sampled(classes: tuple[int, ...] = (), **settings: Any) -> np.ndarray:
    config = SampleConfig(run="r", classes=classes, **({"per_class": 3, "top_k": 0, "top_p": 1.0} | settings))
    labels = sample.sample_labels(config, VAR_CONFIG.num_classes)
    return np.concatenate(list(sample.sample_batches(VAR(VAR_CONFIG), make_tokenizer(), labels, config)))


def test_images_do_not_depend_on_the_batch_they_are_drawn_in() -> None:
    whole = sampled(batch=9)
    assert whole.shape == (9, 8, 8, 3) and whole.dtype == np.uint8
    # 1: batched convolutions may differ in the last bit, and a pixel may lie between two levels
    assert np.abs(whole.astype(int) - sampled(batch=2)).max() <= 1


def test_an_image_depends_on_its_class_and_number_alone() -> None:
    assert np.abs(sampled()[6:].astype(int) - sampled(classes=(2,))).max() <= 1
    fewer = sampled(per_class=2)
    assert np.abs(sampled()[[0, 1, 3, 4]].astype(int) - fewer[:4]).max() <= 1


def test_every_image_of_a_class_and_number_has_a_seed_of_its_own() -> None:
    labels, numbers = np.repeat(np.arange(1000), 50), np.tile(np.arange(50), 1000)
    seeds = np.concatenate([sample.image_seeds(seed, labels, numbers, 1000) for seed in (0, 1, 2)])
    assert len(np.unique(seeds)) == 150_000


def test_another_seed_gives_other_images_and_no_two_are_alike() -> None:
    images = sampled()
    assert not np.array_equal(images, sampled(seed=1))
    assert len({image.tobytes() for image in images}) == 9


def test_a_run_is_sampled_with_the_tokenizer_it_was_trained_on(study: Study) -> None:
    config = study.train_config("sampled", stop_after_steps=1)
    train_var(config)
    sample.launch(command(SampleConfig(run=config.run, per_class=2, batch=4)))
    with np.load(Path(config.run) / "samples" / "samples.npz") as found:
        assert found["arr_0"].shape == (6, 8, 8, 3) and found["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert (Path(config.run) / "samples" / "samples.png").is_file()


def test_a_model_without_a_run_needs_its_tokenizer_named(tmp_path: Path) -> None:
    write_model(tmp_path, VAR(VAR_CONFIG).state_dict(), describe(VAR_CONFIG))
    with pytest.raises(FileNotFoundError, match="add tokenizer=PATH"):
        sample.launch(command(SampleConfig(run=str(tmp_path))))


def test_a_run_is_not_sampled_with_another_tokenizer(study: Study, tmp_path: Path) -> None:
    config = study.train_config("misread", stop_after_steps=1)
    train_var(config)
    write_model(tmp_path, make_tokenizer(seed=1).state_dict(), describe(VQVAE_CONFIG))
    with pytest.raises(ValueError, match="was trained with tokenizer [0-9a-f]{12}, this one is [0-9a-f]{12}"):
        sample.launch(command(SampleConfig(run=config.run, tokenizer=str(tmp_path))))
