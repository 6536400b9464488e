"""The index: what is written is what is read, anything else is one clear error, and its fingerprint sees all of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.index import Index, ShardEntry, Storage, is_complete, refuse_complete, regular_size
from data_pipeline.shards.writer import Sample, write_shards


def entry(**changes: object) -> dict:
    """A shard as the index has it."""
    hashes = {"sha256": "0" * 64, "members_sha256": "0" * 64}
    return {"name": "shard-000000.tar", "samples": 1, "bytes": 1024, **hashes, **changes}


def pack(folder: Path) -> Index:
    samples = [Sample(f"{i:09d}", {"cls": b"1", "png": bytes(i)}) for i in range(7)]
    return write_shards(samples, folder, kind="images", meta={"classes": ["cat", "dog"]}, samples_per_shard=3)


def test_index_round_trips(tmp_path: Path) -> None:
    assert pack(tmp_path) == Index.read(tmp_path, kind="images")


def test_a_folder_is_complete_once_it_has_its_index(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    refuse_complete(tmp_path)
    assert pack(tmp_path).num_samples == 7 and is_complete(tmp_path)
    with pytest.raises(ValueError, match="already packed; delete it"):
        refuse_complete(tmp_path)


@pytest.mark.parametrize(
    "field, value", [("samples", 2), ("bytes", 99999), ("sha256", "0" * 64), ("members_sha256", "0" * 64)]
)
def test_every_field_of_every_shard_is_in_the_fingerprint(tmp_path: Path, field: str, value: int | str) -> None:
    index = pack(tmp_path)
    for number in range(3):
        shards = list(index.shards)
        shards[number] = replace(shards[number], **{field: value})
        assert replace(index, shards=tuple(shards)).fingerprint != index.fingerprint


def test_order_of_shards_and_meta_are_in_the_fingerprint_and_order_of_meta_is_not(tmp_path: Path) -> None:
    index = pack(tmp_path)
    assert replace(index, shards=index.shards[::-1]).fingerprint != index.fingerprint
    assert replace(index, meta={"classes": ["dog", "cat"]}).fingerprint != index.fingerprint
    meta = {"seed": 1, **index.meta}
    assert replace(index, meta=meta).fingerprint == replace(index, meta=dict(reversed(meta.items()))).fingerprint


def test_a_shard_is_listed_once() -> None:
    shard = ShardEntry("shard-000000.tar", 1, 1024, "0" * 64, "0" * 64)
    with pytest.raises(ValueError, match="listed twice"):
        Index("images", (shard, shard), {"classes": ["cat"]})


def test_a_folder_without_index_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; run launchers/pack_images.py"):
        Index.read(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="never packed to the end; run launchers/pack_images.py"):
        Index.read(tmp_path)


def test_an_index_of_another_kind_is_refused(tmp_path: Path) -> None:
    pack(tmp_path)
    with pytest.raises(ValueError, match="holds images, expected codes"):
        Index.read(tmp_path, kind="codes")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"kind": "movies"}, "kind is 'movies'"),
        ({"shards": [{"name": "x"}]}, "missing"),
        ({"shards": [entry(name="../shard-000000.tar")]}, "shard name"),
        ({"shards": [entry(samples=-1)]}, "samples is -1"),
        ({"shards": [entry(samples=10**12)]}, "cannot be in 1024 bytes"),
        ({"shards": [entry(bytes=10**19)]}, "bytes is"),
        ({"shards": [entry(sha256="?")]}, "sha256 is"),
        ({"shards": [entry(sha256=None)]}, "sha256 is"),
        ({"shards": [entry(location="../other/shard.tar")]}, "location is"),
        ({"shards": [entry(location="/data/../etc/passwd")]}, "location is"),
        ({"shards": [entry(location="pipe:cat x")]}, "pipe"),
        ({"shards": [entry(location="https://host/x.tar?X-Amz-Signature=canary")]}, "has a query"),
        ({"shards": [entry(), entry()]}, "listed twice"),
        ({"shards": [entry(extra=1)]}, "extra"),
        ({"meta": {"classes": 10**9}}, "classes is not a list"),
        ({"kind": "codes", "version": 3}, "lacks patch_nums"),
        ({"shards": [entry(samples=2_000_000, bytes=2**40)]}, "2000000 samples, at most 1016800 fit its table"),
        ({"shards": 3}, "int"),
        ({"meta": {}}, "lacks classes"),
    ],
)
def test_a_malformed_index_is_one_clear_error(tmp_path: Path, change: dict, reason: str) -> None:
    pack(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=f"index.json: malformed index, .*{reason}.*index_shards.py") as caught:
        Index.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"version": 1}, {"kind": "codes"}, {"version": 99}])
def test_an_index_of_another_version_says_what_to_do(tmp_path: Path, change: dict) -> None:
    pack(tmp_path)
    path = tmp_path / "index.json"
    values = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(values))
    wanted = 3 if values["kind"] == "codes" else 2
    reason = f"index.json: version is {values['version']}, of {values['kind']} this program reads version {wanted}; d"
    with pytest.raises(DamagedData, match=reason):
        Index.read(tmp_path)


def test_a_table_has_room_for_fewer_samples_where_each_has_more_parts() -> None:
    meta = {"classes": ["a"], "patch_nums": [1], "vocab_size": 2, "num_tokens": 1, "bits": 12, "tokenizer_sha256": ""}
    shard = ShardEntry("shard-000000.tar", 300_000, 2**40, "0" * 64, "0" * 64)
    assert Index("codes", (shard,), {**meta, "views": 8}).record_parts == 8
    with pytest.raises(ValueError, match="300000 samples, at most 208412 fit its table of members"):
        Index("codes", (shard,), {**meta, "views": 16})
    assert Index("images", (shard,), meta).record_parts == 0


def test_random_bytes_in_place_of_the_index_are_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(np.random.default_rng(0).bytes(100))
    with pytest.raises(ValueError, match="index.json: malformed index"):
        Index.read(tmp_path)


def test_places_are_named_as_they_are(tmp_path: Path) -> None:
    index = pack(tmp_path)
    assert Storage(tmp_path).place_of(index.shards[0]) == str(tmp_path / "shard-000000.tar")
    assert Storage("https://host/data/?secret=1").place_of("index.json") == "https://host/data/index.json"


def test_small_files_are_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(b"x" * 100)
    storage = Storage(tmp_path)
    assert storage.read_small("index.json", max_bytes=100) == b"x" * 100
    with pytest.raises(ValueError, match="index.json: 100 bytes, at most 99 are accepted"):
        storage.read_small("index.json", max_bytes=99)
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        storage.read_small("gone", max_bytes=99)


def test_only_regular_files_have_a_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no regular file"):
            regular_size(path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="a part of this path is a file"):
        regular_size(tmp_path / "file" / "index.json")
