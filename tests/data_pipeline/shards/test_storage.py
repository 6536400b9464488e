"""A folder of packed data, local or behind a URL, is the same to its reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from shard_mutations import make_images

from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.index import Index
from data_pipeline.shards.storage import Storage, regular_size
from data_pipeline.shards.writer import write_shards


def pack(folder: Path) -> Index:
    return write_shards(make_images(4), folder, kind="images", meta={"classes": ["a", "b"]}, samples_per_shard=2)


def test_places_are_named_as_they_are(tmp_path: Path) -> None:
    index = pack(tmp_path)
    assert Storage(tmp_path).place_of_shard(index.shards[0]) == str(tmp_path / "shard-000000.tar")
    assert Storage("https://host/data/?secret=1").place_of("index.json") == "https://host/data/index.json"


def test_small_files_are_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"x" * 100)
    storage = Storage(tmp_path)
    assert storage.read_small("index.json", max_bytes=100) == b"x" * 100
    with pytest.raises(ValueError, match="index.json: 100 bytes, at most 99 are accepted"):
        storage.read_small("index.json", max_bytes=99)
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        storage.read_small("gone", max_bytes=99)


def test_shards_of_another_size_are_named(tmp_path: Path) -> None:
    index = pack(tmp_path)
    Storage(tmp_path).check_sizes(index.shards)
    with (tmp_path / "shard-000001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedData, match="shard-000001.tar: .* the index says"):
        Storage(tmp_path).check_sizes(index.shards)


def test_only_regular_files_have_a_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no regular file"):
            regular_size(path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="a part of this path is a file"):
        regular_size(tmp_path / "file" / "index.json")
