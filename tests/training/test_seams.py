"""Seams are free when unused, and obey the fault when one is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from training import seams


@pytest.fixture(autouse=True)
def no_fault_is_left() -> Iterator[None]:
    yield
    seams.install(None)


def test_without_a_fault_the_value_itself_passes() -> None:
    value = object()
    assert seams.reach("somewhere", value) is value
    assert seams.reach("somewhere") is None


def test_a_fault_is_told_the_site_and_decides_the_value() -> None:
    seams.install(lambda site, value: f"{site} {value}")
    assert seams.reach("loop.loss", 3) == "loop.loss 3"


def test_a_fault_may_raise() -> None:
    def full_disk(site: str, value: object) -> object:
        raise OSError(28, "No space left on device")

    seams.install(full_disk)
    with pytest.raises(OSError, match="No space"):
        seams.reach("checkpoint.share.write")


def test_taking_the_fault_away_restores_the_free_passage() -> None:
    seams.install(lambda site, value: 0)
    seams.install(None)
    assert seams.reach("somewhere", 1) == 1
