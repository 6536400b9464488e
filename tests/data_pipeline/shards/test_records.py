"""Records read many at once are those read one by one, whatever else a shard holds."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.index import Index
from data_pipeline.shards.members import SUFFIXES, Sample, row_type
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.records import NOWHERE, RecordKind, RecordPlaces
from data_pipeline.shards.writer import write_shards

PARTS = 4
KIND = RecordKind("vq12", size=12, parts=PARTS)
META = {"classes": ["a"], "patch_nums": [1], "vocab_size": 4096, "num_tokens": 1, "bits": 12, "views": PARTS}
META |= {"tokenizer_sha256": "0" * 64}


def record(number: int) -> bytes:
    return bytes([number] * 2) + bytes(range(number, number + 10))


def pack(folder: Path, samples: list[Sample]) -> ShardReader:
    return ShardReader(folder, write_shards(samples, folder, kind="codes", meta=META, samples_per_shard=4))


def plain_samples(count: int = 11) -> list[Sample]:
    return [Sample(f"{number}", {"vq12": record(number)}) for number in range(count)]


def expected(ids: np.ndarray, parts: np.ndarray) -> list[bytes]:
    return [record(number)[3 * part : 3 * part + 3] for number, part in zip(ids.tolist(), parts.tolist())]


def refuse(sample_id: int) -> bytes:
    raise AssertionError(f"sample {sample_id} is as it should be")


def _remember(asked: list[int], number: int) -> bytes:
    asked.append(number)
    return bytes(12)


def every_part(reader: ShardReader) -> dict[tuple[int, int], bytes | None]:
    """By sample and part what reading this part alone gives; None: it was given up."""
    found: dict[tuple[int, int], bytes | None] = {}
    for number in range(len(reader)):
        for part in range(PARTS):
            asked: list[int] = []
            place = (np.array([number]), np.array([part]))
            row = reader.read_records(*place, KIND, otherwise=partial(_remember, asked))
            found[number, part] = None if asked else row.tobytes()
    return found


def test_any_samples_in_any_order_with_parts_of_their_own(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    generator = np.random.default_rng(0)
    for _ in range(5):
        ids, parts = generator.integers(0, 11, 40), generator.integers(0, PARTS, 40)
        rows = reader.read_records(ids, parts, KIND, otherwise=refuse)
        assert rows.shape == (40, 3) and [row.tobytes() for row in rows] == expected(ids, parts)


@pytest.mark.parametrize("check", [True, False])
def test_samples_that_are_not_one_such_record_are_left_to_others(tmp_path: Path, check: bool) -> None:
    samples = plain_samples()
    samples[1] = Sample("1", {"vq12": record(1), "cls": b"0"})
    samples[2] = Sample("2", {"vq12": record(2) + b"longer"})
    samples[3] = Sample("3", {"vq16": record(3)})
    pack(tmp_path, samples)
    reader, asked = ShardReader(tmp_path, Index.read(tmp_path), check=check), []
    ids, parts = np.arange(11), np.full(11, 2)
    rows = reader.read_records(ids, parts, KIND, otherwise=lambda number: asked.append(number) or record(number))
    assert asked == [1, 2, 3] and [row.tobytes() for row in rows] == expected(ids, parts)


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
        np.arange(11), np.full(11, 1), KIND, otherwise=lambda number: asked.append(number) or record(number)
    )
    assert asked == ([4, 7] if check else [7])
    with pytest.raises(DamagedData, match="shard-000001.tar: damaged shard, it ends at byte"):
        reader.read(7)


def test_damage_costs_the_part_it_is_in_and_no_other(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    path = tmp_path / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[512 + 3] ^= 1  # sample 4, part 1
    content[1536:1542] = content[1539:1542] + content[1536:1539]  # sample 5, parts 0 and 1 swapped
    content[2560:2563] = content[3584:3587]  # sample 6, part 0 is that of sample 7
    path.write_bytes(content)
    found = every_part(reader)
    assert {place for place, row in found.items() if row is None} == {(4, 1), (5, 0), (5, 1), (6, 0)}
    assert all(row in (None, *expected(np.array([number]), np.array([part]))) for (number, part), row in found.items())
    for number in (4, 5, 6):  # and who reads a sample as a whole meets it wherever it is
        with pytest.raises(DamagedData, match=f"member vq12 of sample {number - 4}"):
            reader.read(number)


def test_no_mutation_changes_a_part_in_silence(tmp_path: Path) -> None:
    """Bytes overwritten around the records, one to a whole block of them: each part is the right one or none."""
    reader = pack(tmp_path, plain_samples(4))
    shard = tmp_path / "shard-000000.tar"
    original, generator, given_up = shard.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(original)
        at = 1024 * generator.integers(4) + generator.integers(500, 530)
        size = generator.choice([1, 3, 512])
        content[at : at + size] = generator.bytes(size)
        shard.write_bytes(content)
        for (number, part), row in every_part(reader).items():
            assert row is None or row == expected(np.array([number]), np.array([part]))[0]
            given_up += row is None
    assert given_up > 100


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_end_of_the_process(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    reader.read_records(np.arange(11), np.zeros(11, np.int64), KIND, otherwise=refuse)
    os.truncate(tmp_path / "shard-000002.tar", 0)

    def one(number: int) -> bytes:
        return reader.read(number).members["vq12"]

    with pytest.raises(DamagedData, match="shard-000002.tar: damaged shard, it ends at byte 1024"):
        reader.read_records(np.array([0, 9]), np.zeros(2, np.int64), KIND, otherwise=one)


def test_twins_read_at_the_same_time(tmp_path: Path) -> None:
    reader = pack(tmp_path, plain_samples())
    reader.read_records(np.array([0]), np.array([0]), KIND, otherwise=refuse)  # they share what is known of one shard
    together = threading.Barrier(4)
    ids, parts = np.arange(11).repeat(50), np.full(550, 2)
    found: list[bytes] = []

    def read(own: ShardReader) -> None:
        together.wait()
        found.append(own.read_records(ids, parts, KIND, otherwise=refuse).tobytes())
        own.close()

    twins = [reader.twin() for _ in range(4)]
    assert all(twin._places is reader._places is not None for twin in twins)
    readers = [threading.Thread(target=read, args=(twin,)) for twin in twins]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    assert found == 4 * [b"".join(expected(ids, parts))]
    assert reader.read_records(ids, parts, KIND, otherwise=refuse).tobytes() == found[0]


def test_more_samples_than_memory_can_hold_are_one_line() -> None:
    with pytest.raises(ValueError, match="35184372088832 samples with 4 views take 1,407,375 GB of memory, more than"):
        RecordPlaces(KIND, [2**45])


def test_shards_are_looked_up_once_and_empty_ones_do_not_matter() -> None:
    places = RecordPlaces(KIND, [2, 0, 3])
    table = np.zeros(3, dtype=row_type(PARTS))
    table["suffix"], table["content"], table["size"] = SUFFIXES.index("vq12"), 512, [12, 12, 13]
    table["parts"] = np.arange(12).reshape(3, 4)
    shards = places.shards_of(np.array([4, 0, 3]))
    assert shards.tolist() == [2, 0, 2] and places.unknown(shards) == [0, 2]
    places.fill(2, table, [0, 1, 2, 3])
    assert places.unknown(shards) == [0]
    starts, checksums = places.find(np.array([4, 2, 3]), np.array([1, 0, 3]))
    assert starts == [NOWHERE, 512, 521] and checksums[1:] == [0, 7]
