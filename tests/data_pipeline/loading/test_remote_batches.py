"""Batches from remote shards are those of the local folder, whatever the network does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from remote_files import s3_server
from shard_mutations import make_images
from shard_server import ShardServer, faulty_relay, shard_server
from tiny import VIEWS, open_codes, pack_codes
from workers import wait_for

from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.datasets import ImageDataset
from data_pipeline.loading.loader import train_batches
from data_pipeline.loading.plan import Plan
from data_pipeline.remote import open as remote_open
from data_pipeline.remote.cache import CacheConfig
from data_pipeline.remote.open import RemoteError
from data_pipeline.shards.index import Index, Storage
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import write_shards


@pytest.fixture
def server() -> Iterator[ShardServer]:
    with shard_server() as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_open, "FIRST_PAUSE", 0.01)


def dataset(location: str | Path, cache: CacheConfig | None = None) -> ImageDataset:
    storage = Storage(location, cache)
    return ImageDataset(storage, ImageTransform(16, resize_ratio=1.0), seed=0, random_views=True)


def batches(data: ImageDataset, workers: int, steps: int = 24) -> list[Batch]:
    stream = train_batches(data, batch_size=2, rank=0, world_size=1, samples_seen=3, seed=0, workers=workers, window=8)
    found = list(islice(stream, steps))
    stream.close()
    return found


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.data, other.data) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.positions, other.positions)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    write_shards(make_images(36), folder, kind="images", meta={"classes": ["a", "b"]}, samples_per_shard=3)
    return folder


def hasty_settings(tmp_path: Path, packed: Path, **settings: float) -> CacheConfig:
    """Room for half of the shards, so that they come and go."""
    room = sum(path.stat().st_size for path in packed.glob("*.tar")) * 3 // 4
    folder = str(tmp_path / "cache")
    return CacheConfig(folder=folder, stall_seconds=0.5, retries=6, max_gib=room / 2**30, **settings)


@pytest.mark.parametrize("workers, ahead", [(0, 2), (2, 2)])
def test_batches_over_http_are_those_of_the_local_folder(
    server: ShardServer, tmp_path: Path, packed: Path, workers: int, ahead: int
) -> None:
    """5 % of the requests fail; the second for one shard is never answered, the third for another stops half-way."""
    expected = batches(dataset(packed), 0)
    server.files = {f"data/{path.name}": path.read_bytes() for path in packed.iterdir()}
    server.share = 0.05
    server.faults["data/shard-000003.tar"] += ["ok", "silent"]  # the first is for its size
    server.faults["data/shard-000005.tar"] += ["ok", "stall"]
    data = dataset(server.url("data?key=CANARY"), hasty_settings(tmp_path, packed, ahead=ahead))
    assert_same(batches(data, workers), expected)
    assert not server.faults["data/shard-000003.tar"] and not server.faults["data/shard-000005.tar"]
    held = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert held <= data.storage.cache.config.max_gib * 2**30


def test_a_cache_too_small_for_a_window_is_refused_before_the_first_step(
    server: ShardServer, tmp_path: Path, packed: Path
) -> None:
    server.files = {path.name: path.read_bytes() for path in packed.iterdir()}
    data = dataset(server.url(""), CacheConfig(folder=str(tmp_path / "cache"), max_gib=1e-5))
    with pytest.raises(ValueError, match=r"data.cache.max_gib is 1e-05, but .* data.window=8 .* take up to .* GiB"):
        batches(data, 0)
    assert sum(request.path.endswith(".tar") for request in server.requests) == 12  # their sizes


def test_a_shard_that_stays_away_ends_the_run_in_one_line(server: ShardServer, tmp_path: Path, packed: Path) -> None:
    server.files = {path.name: path.read_bytes() for path in packed.iterdir()}
    settings = CacheConfig(folder=str(tmp_path / "cache"), stall_seconds=0.2, retries=1, ahead=0)
    data = dataset(server.url(""), settings)
    server.always["shard-000004.tar"] = "silent"
    with pytest.raises(RemoteError, match="shard-000004.tar: not delivered in 2 tries"):
        batches(data, workers=1)


@pytest.mark.parametrize("samples_seen", [16, 48 * 10**12])
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_are_fetched_early_from_where_all_ranks_together_are(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, samples_seen: int
) -> None:
    """Both ranks take 8 samples in a first step, two shards here: the next one is early, also in a resumed run."""
    server.files = {path.name: path.read_bytes() for path in pack_codes(tmp_path / "codes", 48).iterdir()}
    data = open_codes(Storage(server.url(""), CacheConfig(folder=str(tmp_path / "cache"), ahead=1)))
    early: list[str] = []
    monkeypatch.setattr(Storage, "fetch_early", lambda self, shard: early.append(shard.name))
    share = {"batch_size": 4, "world_size": 2, "samples_seen": samples_seen, "seed": 0, "window": 4}
    stream = train_batches(data, rank=rank, **share)
    wait_for(lambda: bool(early))
    stream.close()
    number = Plan(data.shard_sizes, seed=0, window=4).samples(samples_seen + 8, samples_seen + 9)[0][0] // 4
    assert early[0] == data.index.shards[number].name


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_s3_are_those_of_the_local_folder(
    tmp_path: Path, packed: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection in twenty breaks, and one is never answered."""
    expected = batches(dataset(packed), 0)
    contents = {f"data/{path.name}": path.read_bytes() for path in packed.iterdir()}
    with s3_server(contents) as port, faulty_relay(port, every=20, stalled={7}) as relay:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "AKIA",
            "AWS_SECRET_ACCESS_KEY": "CANARY",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{relay.port}",
        }.items():
            monkeypatch.setenv(name, value)
        data = dataset("s3://bucket/data", hasty_settings(tmp_path, packed))
        assert_same(batches(data, workers), expected)
        assert relay.broken and relay.connections > 7


def test_a_copy_of_codes_that_went_bad_is_fetched_anew_by_who_meets_it(tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in pack_codes(tmp_path / "codes", 3).iterdir()}
    ids, epochs = np.arange(3), np.zeros(3, dtype=np.int64)
    expected = open_codes(tmp_path / "codes").read(ids, epochs)[0]
    with shard_server(**files) as running:
        dataset = open_codes(Storage(running.url(""), CacheConfig(folder=str(tmp_path / "cache"))))
        copy = tmp_path / "cache" / dataset.index.shards[0].sha256
        for view in (int(expected[1, 1]), (int(expected[1, 1]) + 1) % VIEWS):  # of sample 1: the one shown, and another
            assert torch.equal(dataset.read(ids, epochs)[0], expected)
            content = bytearray(files["shard-000000.tar"])
            content[1536 + 10 * view + 4] ^= 1
            copy.chmod(0o600)
            with copy.open("r+b") as file:  # under the reader that has it open
                file.write(content)
            assert torch.equal(dataset.read(ids, epochs)[0], expected)
            is_shown = view == expected[1, 1]
            assert copy.read_bytes() == (files["shard-000000.tar"] if is_shown else content)


def test_a_copy_that_went_bad_in_the_cache_is_fetched_anew(packed: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in packed.iterdir()}
    with shard_server(**files) as running:
        storage = Storage(running.url(""), CacheConfig(folder=str(tmp_path / "cache")))
        index = Index.read(storage)
        before = [ShardReader(storage, index).read(number) for number in range(3)]
        copy = tmp_path / "cache" / index.shards[0].sha256
        copy.chmod(0o600)
        copy.write_bytes(bytes(index.shards[0].bytes))
        assert [ShardReader(storage, index).read(number) for number in range(3)] == before
        assert copy.read_bytes() == files["shard-000000.tar"]
