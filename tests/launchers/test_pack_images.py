"""launchers/pack_images.py: it leaves a report and a picture; what is packed already is not packed again, nor over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import Study, command

from data_pipeline.images.decoding import image_of
from data_pipeline.shards.index import Index
from data_pipeline.shards.reader import ShardReader
from launchers import pack_images
from launchers.pack_images import PackConfig
from launchers.setup.command_line import parse


def test_packing_again_does_nothing(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    config = PackConfig(source=str(study.folder / "pictures"), out=str(study.folder / "images"), val_fraction=0.25)
    pack_images.launch(command(config))
    assert "nothing to do" in capsys.readouterr().out


def test_the_report_is_printed_and_lies_beside_the_shards_with_a_contact_sheet(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PackConfig(source=str(study.folder / "pictures"), out=str(tmp_path / "images"), val_fraction=0.25)
    pack_images.launch(command(config))
    said = capsys.readouterr().out
    assert "train  12 images of 12 files in 1 shards" in said and "4/4/4 images a class, 8/8/8 x 8/8/8 pixels" in said
    report = json.loads((tmp_path / "images/report.json").read_text())
    table = report["splits"]["val"]["samples_per_class"]
    assert table == {"min": 2, "median": 2, "max": 2, "table": dict.fromkeys("abc", 2)}
    sheet = tmp_path / "images/contact_sheet.png"
    before = sheet.read_bytes()
    sheet.unlink()  # a worker that is killed between the last shard and the picture leaves it to the next start
    pack_images.launch(command(config))
    assert "nothing to do" in capsys.readouterr().out and sheet.read_bytes() == before


def test_of_the_workers_of_one_launcher_the_first_speaks(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    config = PackConfig(source=str(study.folder / "pictures"), out=str(tmp_path / "images"), val_fraction=0.25)
    pack_images.launch(command(config))
    assert capsys.readouterr().out == "" and (tmp_path / "images/contact_sheet.png").exists()


def test_pictures_without_classes_are_not_taken_for_those_with(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PackConfig(
        source=str(study.folder / "pictures"), out=str(tmp_path / "images"), val_fraction=0.25, labels=False
    )
    for said in ("packed into", "nothing to do"):
        pack_images.launch(command(config))
        assert said in capsys.readouterr().out and (tmp_path / "images/contact_sheet.png").exists()
    with pytest.raises(ValueError, match="already packed with labels False, now it is True"):
        pack_images.launch(command(replace(config, labels=True)))
    with pytest.raises(ValueError, match="labels is false, but digits have classes"):
        pack_images.launch(command(replace(config, source="digits", out=str(tmp_path / "digits"))))


CHANGES = [
    {"labels": False},
    {"seed": 1},
    {"resize_short_side": 4},
    {"source": "digits"},
    {"val_fraction": 0.5},
    {"samples_per_shard": 3},
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_packed_otherwise_is_neither_taken_for_done_nor_overwritten(
    study: Study, change: dict[str, Any]
) -> None:
    config = PackConfig(source=str(study.folder / "pictures"), out=str(study.folder / "images"), val_fraction=0.25)
    name = next(iter(change)).replace("resize_short_side", "encoding")
    with pytest.raises(ValueError, match=f"already packed with {name} .*, now it is .*; delete it or choose another"):
        pack_images.launch(command(replace(config, **change)))


@pytest.mark.parametrize("settings, side", [([], 288), (["resize_short_side=null"], 320)])
def test_photographs_are_scaled_down_for_the_official_crops_unless_told_otherwise(
    tmp_path: Path, settings: list[str], side: int
) -> None:
    for label in "ab":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (400, 320), (90, 40 * number, 10)).save(tmp_path / f"photos/{label}/{number}.jpg")
    dotlist = [f"source={tmp_path / 'photos'}", f"out={tmp_path / 'packed'}", "val_fraction=0.5", *settings]
    wanted = parse(PackConfig, dotlist, "")
    assert wanted is not None
    pack_images.launch(wanted)
    folder = tmp_path / "packed/train"
    image = image_of(ShardReader(folder, Index.read(folder)).read(0))
    assert min(image.size) == side
