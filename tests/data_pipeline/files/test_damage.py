"""Damage is an error of its own: whoever handles bad input sees it, and whoever ends the program can tell it apart."""

from __future__ import annotations

import pytest

from data_pipeline.files.damage import BadSample, DamagedData
from launchers.setup.exit_codes import exit_code


def test_damage_is_bad_input_with_an_exit_code_of_its_own() -> None:
    with pytest.raises(ValueError, match="shard"):
        raise DamagedData("shard-000000.tar: damaged")
    assert exit_code(DamagedData("x")) == 65 and exit_code(ValueError("x")) == 64


def test_a_bad_sample_is_told_by_its_facts() -> None:
    assert BadSample("a.tar", 3, "cut", 4) == BadSample("a.tar", 3, "cut", 4) != BadSample("a.tar", 3, "cut", 5)
