"""Reading gives what was written, or an error that names shard and member: whatever happened to the shard between."""

from __future__ import annotations

import os
import pickle
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from plain_shards import META, SAMPLES, pack
from shard_mutations import MUTATIONS, make_images, mutate

from data_pipeline.files.atomic import bytes_sha256
from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.members import ROW, Sample
from data_pipeline.shards.reader import ShardReader, most_open_shards
from data_pipeline.shards.writer import write_shards

SHARD = "shard-000001.tar"


def test_a_reader_survives_the_way_to_another_process(tmp_path: Path) -> None:
    reader = ShardReader(tmp_path, pack(tmp_path))
    reader.read(4)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(4) == reader.read(4)
    reader.close()
    assert copy.read(4) == reader.read(4)


def test_more_shards_than_open_files_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.shards.reader.most_open_shards", lambda: 2)
    reader = ShardReader(tmp_path, pack(tmp_path, samples_per_shard=1))
    opened_before = len(os.listdir("/proc/self/fd"))
    assert [reader.read(i) for i in (0, 1, 2, 3, 0)] == [SAMPLES[i] for i in (0, 1, 2, 3, 0)]
    assert len(os.listdir("/proc/self/fd")) == opened_before + 2


def test_a_local_shard_is_opened_without_a_look_at_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a cache holds can vanish meanwhile; with hundreds open, to look at all would take most of the time."""
    monkeypatch.setattr("data_pipeline.shards.reader.most_open_shards", lambda: 2)
    reader = ShardReader(tmp_path, pack(tmp_path, samples_per_shard=1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", lambda descriptor: pytest.fail("looked at an open shard"))
        assert [reader.read(i).key for i in (0, 1, 2, 3)] == [sample.key for sample in SAMPLES[:4]]


@pytest.mark.parametrize(
    "allowed, expected", [(1024, 256), (20_000, 5_000), (100, 64), (resource.RLIM_INFINITY, 2**18)]
)
def test_readers_leave_room_for_other_files(allowed: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed, allowed))
    assert most_open_shards() == expected


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = pack(tmp_path)
    (tmp_path / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD}: no such file; copy or pack it again"):
        ShardReader(tmp_path, index)


def test_a_truncated_shard_is_named_with_both_sizes(tmp_path: Path) -> None:
    index = pack(tmp_path)
    shard = tmp_path / SHARD
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DamagedData, match=f"{SHARD}: {shard.stat().st_size} bytes, .* {index.shards[1].bytes}"):
        ShardReader(tmp_path, index)


def test_a_pipe_in_place_of_a_shard_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    index = pack(tmp_path)
    (tmp_path / SHARD).unlink()
    os.mkfifo(tmp_path / SHARD)
    with pytest.raises(ValueError, match="is no regular file"):
        ShardReader(tmp_path, index)


MEMBER = 1024  # where the second sample's first member begins: a header and a block of content, then the png
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a flipped header": lambda data: flipped(data, MEMBER + 3),
    "flipped content": lambda data: flipped(data, MEMBER + 512),
    "zeros": lambda data: data[:MEMBER] + bytes(4096) + data[MEMBER + 4096 :],
    "cut at a member": lambda data: data[:MEMBER],
    "cut in a header": lambda data: data[: MEMBER + 100],
    "empty": lambda data: b"",
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_with_shard_and_place(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """The index agrees with the damaged shard in size here, as if the damage came while the run was reading."""
    reader = ShardReader(tmp_path, pack(tmp_path))
    (tmp_path / SHARD).write_bytes(damage((tmp_path / SHARD).read_bytes()))
    assert reader.read(0) == SAMPLES[0]
    with pytest.raises(DamagedData, match=f"{SHARD}: damaged shard, (member png of sample 0|it ends at byte)"):
        [reader.read(number) for number in range(3, 6)]


def test_a_table_that_is_not_the_sealed_one_is_refused(tmp_path: Path) -> None:
    index = pack(tmp_path)
    table = tmp_path / "shard-000001.members"
    content = bytearray(table.read_bytes())
    for damaged in (content[:-33], bytes(len(content)), content[33:] + content[:33]):
        table.write_bytes(damaged)
        with pytest.raises(DamagedData, match="shard-000001.members: damaged, its sha256"):
            ShardReader(tmp_path, index).read(3)
    table.unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001.members: no such file"):
        ShardReader(tmp_path, index).read(3)


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("sample", 3, "does not list the samples 0 to 2"),
        ("suffix", 200, "of an unknown kind or size"),
        ("size", 2**31, "of an unknown kind or size"),
        ("start", 2**63, "overlap or lie outside"),
        ("content", 2**62, "overlap or lie outside"),
        ("start", 10, "overlap or lie outside"),
    ],
)
def test_a_sealed_table_that_cannot_be_is_refused(tmp_path: Path, field: str, value: int, reason: str) -> None:
    """Whoever made the index made this table; reading it must take neither memory nor bytes from elsewhere."""
    index = pack(tmp_path)
    path = tmp_path / "shard-000001.members"
    table = np.frombuffer(path.read_bytes(), dtype=ROW).copy()
    table[field][-1] = value
    path.write_bytes(table.tobytes())
    shards = list(index.shards)
    shards[1] = replace(shards[1], members_sha256=bytes_sha256(table.tobytes()))
    with pytest.raises(DamagedData, match=reason):
        ShardReader(tmp_path, replace(index, shards=tuple(shards))).read(3)


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.faults)])
def test_no_mutation_loses_or_changes_a_sample_in_silence(tmp_path: Path, count: int) -> None:
    """Bits flipped, bytes and blocks overwritten, zeroed, swapped, repeated, removed, cut: found, or without effect."""
    samples = make_images(12)
    index = write_shards(samples, tmp_path, kind="images", meta=META, samples_per_shard=99)
    shard = tmp_path / index.shards[0].name
    original = shard.read_bytes()
    urls = [str(shard)]
    stored = webdataset.WebDataset(urls, shardshuffle=False)
    assert [Sample(s["__key__"], {"cls": s["cls"], "jpg": s["jpg"]}) for s in stored] == samples
    generator = np.random.default_rng(count)
    outcomes: dict[str, int] = dict.fromkeys(("error", "no effect"), 0)
    for number in range(count):
        shard.write_bytes(mutate(original, MUTATIONS[number % len(MUTATIONS)], generator))
        try:
            reader = ShardReader(tmp_path, index)
        except DamagedData as error:
            assert shard.name in str(error)
            outcomes["error"] += 1
            continue
        damaged = 0
        for sample_id, sample in enumerate(samples):
            try:
                assert reader.read(sample_id) == sample, f"mutation {number}: sample {sample_id} changed in silence"
            except DamagedData as error:
                assert shard.name in str(error) and ("member" in str(error) or "ends at byte" in str(error))
                damaged += 1
        outcomes["error" if damaged else "no effect"] += 1
        reader.close()
    assert outcomes["error"] > count / 2
    print(f"{count} mutations: {outcomes}")
