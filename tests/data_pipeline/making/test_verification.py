"""Whatever byte of packed data changes, verification names the file, and what in it if that can be known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_mutations import make_images
from tiny import open_codes, pack_codes

from data_pipeline.files.atomic import bytes_sha256
from data_pipeline.making.verification import folders_of, verify_shards
from data_pipeline.shards.codes import CodeFormat
from data_pipeline.shards.index import Index, Storage
from data_pipeline.shards.members import Sample, row_type
from data_pipeline.shards.writer import write_shards


def pack(folder: Path) -> Index:
    return write_shards(make_images(6), folder, kind="images", meta={"classes": ["a", "b"]}, samples_per_shard=3)


def faults(folder: Path, *, decode: bool = False) -> list[str]:
    storage = Storage(folder)
    reports = verify_shards(storage, Index.read(storage), decode=decode, threads=2)
    return [fault for report in reports for fault in report.faults]


def test_sound_data_have_no_faults(tmp_path: Path) -> None:
    pack(tmp_path / "images")
    pack_codes(tmp_path / "codes")
    for decode in (False, True):
        assert faults(tmp_path / "images", decode=decode) == faults(tmp_path / "codes", decode=decode) == []


def test_every_damaged_member_is_named(tmp_path: Path) -> None:
    pack(tmp_path)
    path = tmp_path / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    for sample in make_images(6)[3:5]:
        content[content.find(sample.members["jpg"]) + 50] ^= 1
    path.write_bytes(content)
    found = faults(tmp_path)
    assert len(found) == 2
    assert all(f"{path}: member jpg of sample {number}" in line for number, line in enumerate(found))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def change_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.parametrize(
    "name, damage, reason",
    [
        ("shard-000001.tar", cut, "2000 bytes, the index says"),
        ("shard-000001.tar", Path.unlink, "no such file"),
        ("shard-000001.tar", change_the_end, "changed where no sample is"),
        ("shard-000001.members", Path.unlink, "no such file"),
        ("shard-000001.members", change_the_end, "sha256 is not the one in the index"),
    ],
)
def test_any_damage_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None], reason: str) -> None:
    pack(tmp_path)
    damage(tmp_path / name)
    found = faults(tmp_path)
    assert found and all(name in line for line in found) and reason in found[0], found


def test_decoding_finds_what_was_packed_wrong(tmp_path: Path) -> None:
    samples = [*make_images(2), Sample("bad", {"cls": b"0", "jpg": b"no"}), Sample("far", {"cls": b"7", "jpg": b""})]
    samples[3].members["jpg"] = make_images(1)[0].members["jpg"]
    write_shards(samples, tmp_path, kind="images", meta={"classes": ["a", "b"]}, samples_per_shard=9)
    assert faults(tmp_path) == []
    found = faults(tmp_path, decode=True)
    assert len(found) == 2 and "sample bad: not a JPEG" in found[0] and "sample far: class 7, of 2 classes" in found[1]


def test_decoding_finds_codes_beyond_the_vocabulary(tmp_path: Path) -> None:
    pack_codes(tmp_path)
    index = Index.read(tmp_path)
    replace(index, meta={**index.meta, "vocab_size": 2}).write(tmp_path)
    assert any("vocab_size is 2" in fault for fault in faults(tmp_path, decode=True))


def test_decoding_finds_a_record_whose_views_disagree_about_the_class(tmp_path: Path) -> None:
    index = Index.read(pack_codes(tmp_path / "whole", 2))
    layout = CodeFormat(num_tokens=5, views=1, bits=12)
    views = [layout.pack(label, np.zeros((1, 5), dtype=int)) for label in (2, 1, 2)]
    samples = [Sample("a", {"vq12": b"".join(views)}), Sample("b", {"vq12": 3 * views[0]})]
    write_shards(samples, tmp_path / "mixed", kind="codes", meta=index.meta, samples_per_shard=2)
    assert [fault.split(": ", 1)[1] for fault in faults(tmp_path / "mixed", decode=True)] == [
        "sample a: its views have several classes, [1, 2]"
    ]


def test_decoding_finds_a_table_whose_checksums_of_views_are_not_theirs(tmp_path: Path) -> None:
    """Reading would be right and slow: each view would be given up, and the whole sample read."""
    index = Index.read(pack_codes(tmp_path, 3))
    path = tmp_path / index.shards[0].members_name
    table = np.frombuffer(path.read_bytes(), dtype=row_type(index.record_parts)).copy()
    table["parts"][1, 2] ^= 1
    path.write_bytes(table.tobytes())
    replace(index, shards=(replace(index.shards[0], members_sha256=bytes_sha256(table.tobytes())),)).write(tmp_path)
    found = faults(tmp_path, decode=True)
    assert len(found) == 1 and "sample 000000001: the table of members has other checksums of its views" in found[0]
    dataset, plain = open_codes(tmp_path), np.array([0, 1, 2])
    assert dataset.read(plain, np.zeros(3, np.int64))[0][:, 0].tolist() == [0, 1, 2]


def test_many_faults_are_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.making.verification.MAX_FAULTS", 2)
    index = pack(tmp_path)
    size = index.shards[0].bytes
    (tmp_path / "shard-000000.tar").write_bytes(np.random.default_rng(0).bytes(size))
    found = faults(tmp_path)
    assert len(found) == 3 and found[-1].endswith("and more")


def test_a_folder_of_splits_stands_for_its_splits(tmp_path: Path) -> None:
    pack(tmp_path / "val")
    shutil.copytree(tmp_path / "val", tmp_path / "train")
    assert folders_of(str(tmp_path)) == [str(tmp_path / "train"), str(tmp_path / "val")]
    assert folders_of(str(tmp_path / "val")) == [str(tmp_path / "val")]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folders_of(str(tmp_path / "gone"))
