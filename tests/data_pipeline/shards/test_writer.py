"""Shards are plain WebDataset tars with reproducible bytes, each with the table of what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset
from plain_shards import META, SAMPLES, pack

from data_pipeline.shards.index import Index
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import Sample, write_shard, write_shards


def test_samples_come_back_in_any_order(tmp_path: Path) -> None:
    index = pack(tmp_path)
    reader = ShardReader(tmp_path, Index.read(tmp_path))
    assert [shard.samples for shard in index.shards] == [3, 3, 1] and len(reader) == 7
    for sample_id in (6, 0, 3, 2, 5, 4, 1, 0):
        assert reader.read(sample_id) == SAMPLES[sample_id]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    index = pack(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in index.shards]
    stored = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [Sample(s["__key__"], {"cls": s["cls"], "png": s["png"]}) for s in stored] == SAMPLES


def test_equal_samples_give_equal_bytes_and_fingerprints(tmp_path: Path) -> None:
    first, second = pack(tmp_path / "a"), pack(tmp_path / "b")
    assert first == second and first.fingerprint == second.fingerprint
    assert (tmp_path / "a/shard-000001.tar").read_bytes() == (tmp_path / "b/shard-000001.tar").read_bytes()
    other = pack(tmp_path / "c", SAMPLES[:6])
    assert other.fingerprint != first.fingerprint


def test_a_code_record_of_1022_bytes_takes_1536(tmp_path: Path) -> None:
    paths = []
    for num_samples in (20, 40):  # multiples of 20: whole tar records of 10,240 bytes plus the same ending
        samples = [Sample(f"{i:09d}", {"vq12": bytes(1022)}) for i in range(num_samples)]
        paths.append(tmp_path / f"shard-{num_samples:06d}.tar")
        write_shard(samples, paths[-1])
    assert paths[1].stat().st_size - paths[0].stat().st_size == 20 * 1536


def test_an_interrupted_writer_leaves_no_index_and_no_half_shard(tmp_path: Path) -> None:
    def broken_stream():
        yield from SAMPLES[:4]
        raise RuntimeError("power failure")

    with pytest.raises(RuntimeError):
        write_shards(broken_stream(), tmp_path, kind="images", meta=META, samples_per_shard=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.members", "shard-000000.tar"]
    pack(tmp_path)  # and the work can simply be repeated


def test_packed_data_is_not_overwritten(tmp_path: Path) -> None:
    pack(tmp_path)
    with pytest.raises(ValueError, match="already packed; delete it"):
        pack(tmp_path)


@pytest.mark.parametrize("key, suffix", [("a.v1", "png"), ("../a", "png"), ("a", "seg.png"), ("", "png"), ("a", "")])
def test_names_that_webdataset_would_misread_are_refused(tmp_path: Path, key: str, suffix: str) -> None:
    with pytest.raises(ValueError, match="expected (1 to 80|one of)"):
        pack(tmp_path, [Sample(key, {suffix: b""})])
    assert not list(tmp_path.iterdir())


def test_two_samples_of_one_key_are_refused(tmp_path: Path) -> None:
    """As one file they would be one sample, or an ambiguous one."""
    with pytest.raises(ValueError, match="two members a.png"):
        pack(tmp_path, [Sample("a", {"png": b"1"}), Sample("a", {"png": b"2"})])
    with pytest.raises(ValueError, match="2 samples make 1; give each a key of its own"):
        pack(tmp_path, [Sample("a", {"png": b"1"}), Sample("a", {"cls": b"2"})])
    assert not list(tmp_path.iterdir())
