"""Settings of data are refused where they are written, not where they are used."""

from __future__ import annotations

from typing import Any

import pytest

from launchers.index_shards import IndexConfig
from launchers.setup.config_files import load_config
from launchers.setup.settings import DataConfig, TrainConfig


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"workers": -1}, "data.workers is -1"),
        ({"window": 0}, "data.window is 0"),
        ({"bad_samples": "quarantine"}, "accepted: strict, or quarantine:MAX"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DataConfig(**settings)


def test_the_policy_for_bad_samples_is_strict_unless_asked_otherwise() -> None:
    assert DataConfig().max_bad == 0 and DataConfig(bad_samples="quarantine:7").max_bad == 7


def test_settings_of_data_can_be_given_on_the_command_line() -> None:
    settings = ["run=r", "tokenizer=t", "model.depth=2", "data.bad_samples=quarantine:7", "data.cache.max_gib=3.5"]
    config = load_config(TrainConfig, None, settings)
    assert config.data.max_bad == 7 and config.data.cache.max_gib == 3.5


def test_an_index_needs_shards_and_at_least_a_class() -> None:
    with pytest.raises(ValueError, match="shards is empty"):
        IndexConfig(shards=(), out="o")
    with pytest.raises(ValueError, match="classes is 0"):
        IndexConfig(shards=("a.tar",), out="o", classes=0)
