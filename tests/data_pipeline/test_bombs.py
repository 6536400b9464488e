"""Small files that claim to be large cost at most 256 MiB of memory above what the process has."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from peak_memory import BOUND, peak_memory
from shard_mutations import make_images
from tars import member, tar_of

from data_pipeline.loading.datasets import CodeDataset
from data_pipeline.making.indexing import expand_shards, index_shards
from data_pipeline.making.verification import verify_shards
from data_pipeline.remote.cache import CacheConfig, ShardCache
from data_pipeline.shards.index import Index, Storage, shard_name
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import write_shards

GIB = 2**30
META = {"classes": ["a", "b"]}
Bomb = Callable[[Path], Callable[[], object]]  # (folder) -> the call that comes across it


def as_tar(content: bytes, *, hole: int = 0) -> Bomb:
    """A tar of somebody else, followed by `hole` bytes that take no room on disk."""

    def build(folder: Path) -> Callable[[], object]:
        path = folder / "theirs.tar"
        path.write_bytes(content)
        os.truncate(path, len(content) + hole)
        options = {"num_classes": None, "json_label": "label", "decode": True, "report": lambda line: None}
        return lambda: index_shards([str(path)], folder / "out", cache=ShardCache(CacheConfig()), **options)

    return build


def sparse(size: int) -> bytes:
    """A GNU sparse file of one hole: 1,536 bytes that tarfile reads as `size`."""
    info = member("a.jpg", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % size, b"%011o\0" % 0
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def compressed_members() -> bytes:
    zeros = gzip.compress(bytes(512 * 2**20), 1)
    return tar_of((member("a.cls"), b"0"), (member("a.jpg.gz"), zeros), (member("a.jpg"), zeros[: 2**20]))


def packed(name: str, size: int) -> Bomb:
    """A packed folder in which one file has grown to `size` bytes that take no room on disk."""

    def build(folder: Path) -> Callable[[], object]:
        index = write_shards(make_images(3), folder, kind="images", meta=META, samples_per_shard=9)
        os.truncate(folder / name, size)
        if name.endswith(".tar"):
            return lambda: list(verify_shards_of(folder, index))
        return lambda: ShardReader(folder, Index.read(folder)).read(0)

    return build


def verify_shards_of(folder: Path, index: Index) -> list[str]:
    reports = list(verify_shards(Storage(folder), index, decode=True, threads=1))
    assert any(report.faults for report in reports)
    return [fault for report in reports for fault in report.faults]


def index_of(text: str) -> Bomb:
    def build(folder: Path) -> Callable[[], object]:
        (folder / "index.json").write_text(text)
        return lambda: ShardReader(folder, Index.read(folder)).read(0)

    return build


def entry(**changes: object) -> str:
    shard = {"name": "shard-000000.tar", "samples": 1, "bytes": 1024, "sha256": "0" * 64, "members_sha256": "0" * 64}
    return json.dumps({"version": 2, "kind": "images", "shards": [shard | changes], "meta": META})


def claims_many_samples(folder: Path) -> Callable[[], object]:
    """A sparse shard is large enough for them, and the table is sealed, but short."""
    samples, table = 200_000_000, bytes(33)
    (folder / "shard-000000.tar").touch()
    os.truncate(folder / "shard-000000.tar", samples * 512)
    (folder / "shard-000000.members").write_bytes(table)
    (folder / "index.json").write_text(
        entry(samples=samples, bytes=samples * 512, members_sha256=hashlib.sha256(table).hexdigest())
    )
    return lambda: ShardReader(folder, Index.read(folder)).read(0)


def claims_many_codes(folder: Path) -> Callable[[], object]:
    """Sparse shards with nearly as many samples as their tables may have, and a table that is short."""
    (folder / "shard-000000.members").write_bytes(bytes(33))
    each, number = 200_000, 500
    size = each * 512
    for shard in range(number):
        (folder / shard_name(shard)).touch()
        os.truncate(folder / shard_name(shard), size)
    seals = {"sha256": "0" * 64, "members_sha256": hashlib.sha256(bytes(33)).hexdigest()}
    shards = [{"name": shard_name(shard), "samples": each, "bytes": size, **seals} for shard in range(number)]
    meta = {"classes": ["a"], "patch_nums": [1], "vocab_size": 2, "num_tokens": 1, "bits": 12, "views": 16}
    meta |= {"tokenizer_sha256": "0" * 64}
    (folder / "index.json").write_text(json.dumps({"version": 3, "kind": "codes", "shards": shards, "meta": meta}))
    codes = {"patch_nums": [1], "vocab_size": 2, "tokenizer_sha256": "0" * 64}
    return lambda: CodeDataset(folder, **codes).try_one()


def film_between(folder: Path) -> Callable[[], object]:
    """A tar of somebody else: a picture, a film of 400 MiB that takes no room on disk, and the picture's class."""
    jpeg, size = make_images(1)[0].members["jpg"], 400 * 2**20
    head = tar_of((member("a.jpg"), jpeg))[: 512 + -(-len(jpeg) // 512) * 512]
    with (folder / "theirs.tar").open("wb") as file:
        file.write(head + member("a.mp4", size=size).tobuf(tarfile.GNU_FORMAT))
        file.seek(size, os.SEEK_CUR)
        file.write(tar_of((member("a.cls"), b"0")))
    options = {"num_classes": None, "json_label": "label", "decode": True, "report": lambda line: None}
    index, _ = index_shards([str(folder / "theirs.tar")], folder / "out", cache=ShardCache(CacheConfig()), **options)

    def read_and_verify() -> None:
        assert ShardReader(folder / "out", index).read(0).members == {"jpg": jpeg, "cls": b"0"}
        reports = verify_shards(Storage(folder / "out"), index, decode=True, threads=1)
        assert not any(report.faults for report in reports)

    return read_and_verify


def large_json() -> bytes:
    return tar_of((member("a.jpg"), b"x"), (member("a.json"), b"[" + b"[]," * (20 * 2**20) + b"[]]"))


BOMBS: dict[str, Bomb] = {
    "a sparse member of 8 GiB": as_tar(sparse(8 * GIB - 1)),
    "a member that claims a terabyte": as_tar(member("a.jpg", size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(9999)),
    "a member of 4 GiB": as_tar(member("a.jpg", size=4 * GIB).tobuf(tarfile.GNU_FORMAT), hole=4 * GIB + 1024),
    "a name of 4 GiB": as_tar(member("x", b"L", 4 * GIB).tobuf(tarfile.GNU_FORMAT), hole=4 * GIB + 1024),
    "a pax header of 4 GiB": as_tar(member("x", b"x", 4 * GIB).tobuf(tarfile.GNU_FORMAT), hole=4 * GIB + 1024),
    "nothing for 16 GiB": as_tar(b"x" * 512, hole=16 * GIB),
    "a gzip of a tar of 512 MiB": as_tar(gzip.compress(bytes(512 * 2**20), 1)),
    "members that inflate to 512 MiB": as_tar(compressed_members()),
    "a json of 20 million lists": as_tar(large_json()),
    "an index of 16 GiB": packed("index.json", 16 * GIB),
    "a table of 16 GiB": packed("shard-000000.members", 16 * GIB),
    "a shard grown to 16 GiB": packed("shard-000000.tar", 16 * GIB),
    "an index that claims a trillion samples": index_of(entry(samples=10**12, bytes=10**15)),
    "an index nested a million times": index_of("[" * 10**6),
    "an index of a million shards": index_of(json.dumps({"version": 2, "kind": "images", "shards": [{}] * 10**6})),
    "a shard that claims 200 million samples": claims_many_samples,
    "codes that claim 100 million samples": claims_many_codes,
    "an index of 10 million lists": index_of("[" + "[]," * (10 * 2**20) + "[]]"),
    "a film between picture and class": film_between,
    "letters for shards without end": lambda folder: lambda: expand_shards(["/gone/" + "{a..z}" * 6 + ".tar"]),
    "numbers for shards without end": lambda folder: lambda: expand_shards(["/gone/{0..99999999}{0..99999999}.tar"]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_stays_bounded(tmp_path: Path, name: str) -> None:
    call = BOMBS[name](tmp_path)

    def go_off() -> None:
        with contextlib.suppress(ValueError, OSError):
            call()

    used = peak_memory(go_off)
    assert used <= BOUND, f"{used / 2**20:.0f} MiB"
    print(f"{name}: {used / 2**20:.1f} MiB")


def test_the_measure_sees_memory() -> None:
    assert peak_memory(lambda: len(bytearray(os.urandom(1)) * (300 * 2**20))) > BOUND
