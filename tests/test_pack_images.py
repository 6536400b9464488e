"""launchers/pack_images.py: what is packed already is not packed again, and never over something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny import Study, command

from launchers import pack_images
from launchers.config import PackConfig


def test_packing_again_does_nothing(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = PackConfig(source=str(study.folder / "pictures"), out=str(study.folder / "images"), val_fraction=0.25)
    pack_images.launch(command(config))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 1}, {"resize_short_side": 4}, {"source": "digits"}])
def test_a_folder_packed_otherwise_is_neither_taken_for_done_nor_overwritten(
    study: Study, change: dict[str, Any]
) -> None:
    config = PackConfig(source=str(study.folder / "pictures"), out=str(study.folder / "images"), val_fraction=0.25)
    with pytest.raises(ValueError, match="already packed; delete it"):
        pack_images.launch(command(replace(config, **change)))
