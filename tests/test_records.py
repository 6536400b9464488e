"""Records read many at once are those read one by one, whatever else a shard holds."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.damage import DamagedData
from data_pipeline.index import Index
from data_pipeline.members import ROW, SUFFIXES, Sample
from data_pipeline.reader import ShardReader
from data_pipeline.records import RecordKind, RecordPlaces
from data_pipeline.shards import write_shards

KIND = RecordKind("json", size=12, head=2, part=3)
META = {"classes": ["a"]}


def record(number: int) -> bytes:
    return bytes([number] * 2) + bytes(range(number, number + 10))


def pack(folder: Path, samples: list[Sample]) -> ShardReader:
    return ShardReader(folder, write_shards(samples, folder, kind="images", meta=META, samples_per_shard=4))


def plain_samples(count: int = 11) -> list[Sample]:
    return [Sample(f"{number}", {"json": record(number)}) for number in range(count)]


def expected(ids: np.ndarray, offsets: np.ndarray) -> list[bytes]:
    return [record(number)[:2] + record(number)[at : at + 3] for number, at in zip(ids.tolist(), offsets.tolist())]


def refuse(sample_id: int) -> bytes:
    raise AssertionError(f"sample {sample_id} is as it should be")


def test_any_samples_in_any_order_with_parts_of_their_own(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    generator = np.random.default_rng(0)
    for _ in range(5):
        ids, offsets = generator.integers(0, 11, 40), generator.integers(0, 10, 40)
        rows = reader.read_records(ids, offsets, KIND, otherwise=refuse)
        assert rows.shape == (40, 5) and [row.tobytes() for row in rows] == expected(ids, offsets)


def test_samples_that_are_not_one_such_record_are_left_to_others(tmp_path: Path) -> None:
    samples = plain_samples()
    samples[1] = Sample("1", {"json": record(1), "cls": b"0"})
    samples[2] = Sample("2", {"json": record(2) + b"longer"})
    samples[3] = Sample("3", {"cls": record(3)})
    reader, asked = pack(tmp_path, samples), []
    ids, offsets = np.arange(11), np.full(11, 2)
    rows = reader.read_records(ids, offsets, KIND, otherwise=lambda number: asked.append(number) or record(number))
    assert asked == [1, 2, 3] and [row.tobytes() for row in rows] == expected(ids, offsets)


@pytest.mark.parametrize("check", [True, False])
def test_a_changed_or_missing_byte_is_not_passed_on(tmp_path: Path, check: bool) -> None:
    pack(tmp_path, plain_samples())
    reader = ShardReader(tmp_path, Index.read(tmp_path), check=check)
    path = tmp_path / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[512 + 3] ^= 1  # in the record of sample 4, the shard's first
    path.write_bytes(content[: 3 * 1024 + 512])  # and nothing of that of sample 7, its last
    asked: list[int] = []
    reader.read_records(
        np.arange(11), np.full(11, 2), KIND, otherwise=lambda number: asked.append(number) or record(number)
    )
    assert asked == ([4, 7] if check else [7])
    with pytest.raises(DamagedData, match="shard-000001.tar: damaged shard, it ends at byte"):
        reader.read(7)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_end_of_the_process(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    reader.read_records(np.arange(11), np.zeros(11, np.int64), KIND, otherwise=refuse)
    os.truncate(tmp_path / "shard-000002.tar", 0)

    def one(number: int) -> bytes:
        return reader.read(number).members["json"]

    with pytest.raises(DamagedData, match="shard-000002.tar: damaged shard, it ends at byte 1024"):
        reader.read_records(np.array([0, 9]), np.zeros(2, np.int64), KIND, otherwise=one)


def test_twins_read_at_the_same_time(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    ids, offsets = np.arange(11).repeat(50), np.full(550, 2)
    found: list[bytes] = []

    def read(own: ShardReader) -> None:
        found.append(own.read_records(ids, offsets, KIND, otherwise=refuse).tobytes())
        own.close()

    readers = [threading.Thread(target=read, args=(reader.twin(),)) for _ in range(4)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert found == 4 * [b"".join(expected(ids, offsets))]
    assert reader.read_records(ids, offsets, KIND, otherwise=refuse).tobytes() == found[0]


def test_shards_are_looked_up_once_and_empty_ones_do_not_matter() -> None:
    places = RecordPlaces(KIND, [2, 0, 3])
    table = np.zeros(3, dtype=ROW)
    table["suffix"], table["content"], table["size"] = SUFFIXES.index("json"), 512, [12, 12, 13]
    shards = places.shards_of(np.array([4, 0, 3]))
    assert shards.tolist() == [2, 0, 2] and places.unknown(shards) == [0, 2]
    places.fill(2, table, [0, 1, 2, 3])
    assert places.unknown(shards) == [0] and [row[1] for row in places.find(np.array([4, 2, 3]))] == [0, 524, 524]
