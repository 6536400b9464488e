"""Shards are plain WebDataset tars with reproducible bytes; damage is an error that names the shard, never a loss."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from data_pipeline.index import Index, ShardEntry
from data_pipeline.shards import Sample, ShardReader, write_shard, write_shards

META = {"classes": ["cat", "dog"]}


def make_samples(num_samples: int = 7) -> list[Sample]:
    sizes = [0, 1, 511, 512, 513, 1022, 3000]
    contents = [bytes([65 + i]) * sizes[i % len(sizes)] for i in range(num_samples)]
    return [Sample(f"{i:09d}", {"cls": b"1", "png": content}) for i, content in enumerate(contents)]


def pack(folder: Path, samples: list[Sample] | None = None, samples_per_shard: int = 3) -> Index:
    samples = make_samples() if samples is None else samples
    return write_shards(samples, folder, kind="images", meta=META, samples_per_shard=samples_per_shard)


def rewrite_index(folder: Path, shard: Path) -> Index:
    """An index that agrees with the damaged shard in size, so that only its content can give the damage away."""
    index = Index.read(folder)
    shards = [ShardEntry(s.name, s.samples, (folder / s.name).stat().st_size, s.sha256) for s in index.shards]
    return Index(index.kind, tuple(shards), index.meta)


def test_samples_come_back_in_any_order(tmp_path: Path) -> None:
    index = pack(tmp_path)
    reader = ShardReader(tmp_path, Index.read(tmp_path))
    assert [shard.samples for shard in index.shards] == [3, 3, 1] and len(reader) == 7
    for sample_id in (6, 0, 3, 2, 5, 4, 1, 0):
        assert reader.read(sample_id) == make_samples()[sample_id]
    reader.verify()


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    index = pack(tmp_path)
    urls = [str(tmp_path / shard.name) for shard in index.shards]
    stored = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [Sample(s["__key__"], {"cls": s["cls"], "png": s["png"]}) for s in stored] == make_samples()


def test_equal_samples_give_equal_bytes_and_fingerprints(tmp_path: Path) -> None:
    first, second = pack(tmp_path / "a"), pack(tmp_path / "b")
    assert first == second and first.fingerprint == second.fingerprint
    assert (tmp_path / "a/shard-000001.tar").read_bytes() == (tmp_path / "b/shard-000001.tar").read_bytes()
    other = pack(tmp_path / "c", make_samples(6))
    assert other.fingerprint != first.fingerprint


def test_a_code_record_of_1022_bytes_takes_1536(tmp_path: Path) -> None:
    paths = []
    for num_samples in (20, 40):  # multiples of 20: whole tar records of 10,240 bytes plus the same ending
        samples = [Sample(f"{i:09d}", {"vq12": bytes(1022)}) for i in range(num_samples)]
        paths.append(tmp_path / f"shard-{num_samples:06d}.tar")
        write_shard(samples, paths[-1])
    assert paths[1].stat().st_size - paths[0].stat().st_size == 20 * 1536


def test_a_reader_survives_the_way_to_another_process(tmp_path: Path) -> None:
    reader = ShardReader(tmp_path, pack(tmp_path))
    reader.read(4)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(4) == reader.read(4)
    reader.close()
    assert copy.read(4) == reader.read(4)


def test_more_shards_than_open_files_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_SHARDS", 2)
    reader = ShardReader(tmp_path, pack(tmp_path, samples_per_shard=1))
    assert [reader.read(i) for i in (0, 1, 2, 3, 0)] == [make_samples()[i] for i in (0, 1, 2, 3, 0)]


def test_an_interrupted_writer_leaves_no_index_and_no_half_shard(tmp_path: Path) -> None:
    def broken_stream():
        yield from make_samples(4)
        raise RuntimeError("power failure")

    with pytest.raises(RuntimeError):
        write_shards(broken_stream(), tmp_path, kind="images", meta=META, samples_per_shard=3)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]
    pack(tmp_path)  # and the work can simply be repeated


def test_packed_data_is_not_overwritten(tmp_path: Path) -> None:
    pack(tmp_path)
    with pytest.raises(ValueError, match="already packed; delete it"):
        pack(tmp_path)


@pytest.mark.parametrize("key, suffix", [("a.v1", "png"), ("../a", "png"), ("a", "seg.png"), ("", "png"), ("a", "")])
def test_names_that_webdataset_would_misread_are_refused(tmp_path: Path, key: str, suffix: str) -> None:
    with pytest.raises(ValueError, match="expected key.suffix"):
        pack(tmp_path, [Sample(key, {suffix: b""})])
    assert not list(tmp_path.iterdir())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = pack(tmp_path)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001.tar: no such shard.*pack it again"):
        ShardReader(tmp_path, index)


def test_a_truncated_shard_is_named_with_both_sizes(tmp_path: Path) -> None:
    index = pack(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=f"shard-000001.tar: {shard.stat().st_size} bytes, .* {index.shards[1].bytes}"):
        ShardReader(tmp_path, index)


def test_a_flipped_content_byte_is_found_by_verify(tmp_path: Path) -> None:
    index = pack(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[512] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="shard-000001.tar: sha256"):
        ShardReader(tmp_path, index).verify()


def flip_header(content: bytearray) -> bytearray:
    content[1024 + 3] ^= 1  # the second header: cls is one block of header and one of content
    return content


def zero_hole(content: bytearray) -> bytearray:
    content[1024 : 1024 + 4096] = bytes(4096)
    return content


def cut_at_member(content: bytearray) -> bytearray:
    return content[:1024]


def cut_in_header(content: bytearray) -> bytearray:
    return content[: 1024 + 100]


def empty(content: bytearray) -> bytearray:
    return bytearray()


@pytest.mark.parametrize("damage", [flip_header, zero_hole, cut_at_member, cut_in_header, empty])
def test_damage_is_never_taken_for_the_end(tmp_path: Path, damage: Callable[[bytearray], bytearray]) -> None:
    pack(tmp_path)
    shard = tmp_path / "shard-000001.tar"
    shard.write_bytes(damage(bytearray(shard.read_bytes())))
    reader = ShardReader(tmp_path, rewrite_index(tmp_path, shard))
    assert reader.read(0) == make_samples()[0]
    with pytest.raises(ValueError, match="shard-000001.tar: damaged shard"):
        reader.read(3)


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info, content in members:
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info


@pytest.mark.parametrize(
    "content",
    [
        tar_of((member("a.png", tarfile.SYMTYPE), b"")),
        tar_of((member("a.png", tarfile.GNUTYPE_SPARSE), b"")),
        tar_of((member("../../a.png"), b"x")),
        tar_of((member("a.png"), b"x"), (member("a.png"), b"y")),
        tar_of((member("a.png"), b"x"), (member("b.png"), b"x"), (member("a.cls"), b"1"), (member("b.cls"), b"1")),
        tar_of((member("a" * 200 + ".png"), b"x")),
        member("a.png", size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(10240),
    ],
    ids=["link", "sparse", "path outside", "twice the same member", "interleaved keys", "long name", "huge size"],
)
def test_tars_with_anything_but_plain_members_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(content)
    index = Index("images", (ShardEntry("shard-000000.tar", 1, len(content), "0" * 64),), META)
    with pytest.raises(ValueError, match="shard-000000.tar: damaged shard"):
        ShardReader(tmp_path, index).read(0)
