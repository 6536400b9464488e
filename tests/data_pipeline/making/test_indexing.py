"""Other people's tars, indexed in place, give the samples that WebDataset reads, with the same guarantees as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from foreign_shards import write_theirs, write_two
from shard_mutations import make_images
from tars import member, tar_of

from data_pipeline.files.damage import DamagedData
from data_pipeline.images.decoding import ImageTransform
from data_pipeline.loading.datasets import ImageDataset
from data_pipeline.making import indexing
from data_pipeline.making.indexing import MAX_SHARDS, expand_shards, index_shards
from data_pipeline.making.sources import ALL
from data_pipeline.making.verification import verify_shards
from data_pipeline.remote.cache import CacheConfig, ShardCache
from data_pipeline.shards.index import Index, Storage
from data_pipeline.shards.members import Sample
from data_pipeline.shards.reader import ShardReader


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return write_two(tmp_path / "theirs")


def index(patterns: list[str], out: Path, **options: Any) -> Index:
    settings = {"num_classes": None, "json_label": "label", "decode": False} | options
    found, _ = index_shards(patterns, out, cache=ShardCache(CacheConfig()), report=lambda line: None, **settings)
    return found


def test_the_samples_are_those_that_webdataset_reads(theirs: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    found = index([f"{theirs}/part-{{000..001}}.tar"], tmp_path / "out")
    reader = ShardReader(tmp_path / "out", Index.read(tmp_path / "out"))
    stored = webdataset.WebDataset([str(theirs / name) for name in sorted(before)], shardshuffle=False)
    for number, one in enumerate(stored):
        assert reader.read(number) == Sample(one["__key__"], {"cls": one["cls"], "jpeg": one["jpeg"]})
    assert len(reader) == 10 and found.meta["classes"] == ["0", "1"] and found.meta["ignored_members"] == {".txt": 10}
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before
    assert all(not report.faults for report in verify_shards(Storage(tmp_path / "out"), found, decode=True, threads=1))


def test_they_train_as_ours_do(theirs: Path, tmp_path: Path) -> None:
    index([str(theirs)], tmp_path / "out")
    dataset = ImageDataset(tmp_path / "out", ImageTransform(8), seed=0, random_views=True)
    images, labels = dataset.read(np.arange(10), np.zeros(10, np.int64))
    assert images.shape == (10, 3, 8, 8) and labels.tolist() == [number % 2 for number in range(10)]


def test_labels_can_come_from_a_field_of_json(tmp_path: Path) -> None:
    write_theirs(tmp_path / "a.tar", make_images(4), label="class_id")
    index([str(tmp_path / "a.tar")], tmp_path / "out", json_label="class_id")
    dataset = ImageDataset(tmp_path / "out", ImageTransform(8), seed=0, random_views=False)
    assert [dataset.label(number) for number in range(4)] == [0, 1, 0, 1]


def test_damage_after_indexing_is_found(theirs: Path, tmp_path: Path) -> None:
    found = index([str(theirs)], tmp_path / "out")
    shard = theirs / "part-001.tar"
    content = bytearray(shard.read_bytes())
    place = content.find(make_images(10)[7].members["jpg"])
    content[place + 30] ^= 4
    shard.write_bytes(content)
    reader = ShardReader(tmp_path / "out", found)
    assert reader.read(6).members["cls"] == b"0"
    with pytest.raises(DamagedData, match="part-001.tar: damaged shard, member jpeg of sample 2"):
        reader.read(7)
    reports = list(verify_shards(Storage(tmp_path / "out"), found, decode=False, threads=2))
    assert [len(report.faults) for report in reports] == [0, 1] and "part-001.tar" in reports[1].faults[0]


def test_unusable_samples_are_left_out_and_listed(tmp_path: Path) -> None:
    jpeg = make_images(1)[0].members["jpg"]
    files = [
        ("good.jpg", jpeg), ("good.cls", b"1"),
        ("no_image.cls", b"1"),
        ("two.jpg", jpeg), ("two.png", jpeg), ("two.cls", b"0"),
        ("no_class.jpg", jpeg),
        ("far.jpg", jpeg), ("far.cls", b"9"),
        ("broken.jpg", jpeg[:200]), ("broken.cls", b"0"),
        ("fine.jpg", jpeg), ("fine.cls", b"0"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_of(*((member(name), data) for name, data in files)))
    found = index([str(tmp_path / "a.tar")], tmp_path / "out", num_classes=2, decode=True)
    reader = ShardReader(tmp_path / "out", found)
    assert [reader.read(number).key for number in range(len(reader))] == ["good", "fine"]
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in skipped] == ["no_image", "two", "no_class", "far", "broken"]
    assert all(row["reason"] for row in skipped) and found.meta["skipped"] == 5


def test_names_with_dots_go_by_webdatasets_rule_and_lost_pictures_are_listed(tmp_path: Path) -> None:
    """All after the first dot is the suffix: a mask beside a picture is no loss, a picture that stands alone is."""
    jpeg = make_images(1)[0].members["jpg"]
    files = [
        ("a.jpg", jpeg), ("a.seg.png", jpeg), ("a.cls", b"1"),
        ("img.v2.jpg", jpeg), ("img.v2.cls", b"1"),
        ("b.jpg", jpeg), ("b.cls", b"0"),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_of(*((member(name), data) for name, data in files)))
    found = index([str(tmp_path / "a.tar")], tmp_path / "out")
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert found.num_samples == 2 and found.meta["skipped"] == 1
    assert [row["key"] for row in skipped] == ["img.v2.jpg"]
    assert "suffix is v2.jpg" in skipped[0]["reason"] and "rename it" in skipped[0]["reason"]


def test_lists_of_what_is_left_out_are_bounded_and_counts_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "MAX_LISTED", 3)
    jpeg = make_images(1)[0].members["jpg"]
    files = [("good.jpg", jpeg), ("good.cls", b"0")]
    files += [(f"{number}.{number}x{number}.jpg", jpeg) for number in range(80)]
    (tmp_path / "a.tar").write_bytes(tar_of(*((member(name), data) for name, data in files)))
    (tmp_path / "b.tar").write_bytes(tar_of(*((member(name.replace("x", "y")), data) for name, data in files)))
    found = index([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], tmp_path / "out")
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) == 3
    assert found.meta["skipped"] == 160 and len(found.meta["ignored_members"]) <= 51
    assert sum(found.meta["ignored_members"].values()) == 160


def test_pictures_without_classes_can_be_indexed(tmp_path: Path) -> None:
    images = make_images(4)
    files = [(f"{number}.jpg", sample.members["jpg"]) for number, sample in enumerate(images)]
    (tmp_path / "a.tar").write_bytes(tar_of(*((member(name), data) for name, data in files)))
    with pytest.raises(ValueError, match="no sample with one image and one class.*labels=false"):
        index([str(tmp_path / "a.tar")], tmp_path / "out")
    found = index([str(tmp_path / "a.tar")], tmp_path / "out", json_label=None)
    assert found.num_samples == 4 and found.meta["classes"] == [ALL]
    dataset = ImageDataset(tmp_path / "out", ImageTransform(8), seed=0, random_views=False)
    assert dataset.read(np.arange(4), np.zeros(4, np.int64))[1].tolist() == [0, 0, 0, 0]
    assert all(not report.faults for report in verify_shards(Storage(tmp_path / "out"), found, decode=True, threads=1))


def test_a_damaged_tar_is_not_indexed(theirs: Path, tmp_path: Path) -> None:
    content = (theirs / "part-001.tar").read_bytes()
    (theirs / "part-001.tar").write_bytes(content[:1024])
    with pytest.raises(DamagedData, match="part-001.tar: .*copy it again, or leave it out"):
        index([str(theirs)], tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def test_patterns_stand_for_tars_in_order(theirs: Path, tmp_path: Path) -> None:
    both = [str(theirs / "part-000.tar"), str(theirs / "part-001.tar")]
    (tmp_path / "list.txt").write_text(f"# two\n{both[1]}\n\n{theirs}/part-{{000,}}.tar\n".replace("{000,}", "000"))
    assert expand_shards([f"{theirs}/part-{{000..001}}.tar"]) == both
    assert expand_shards([f"{theirs}/part-00{{1,0}}.tar"]) == both[::-1]
    assert expand_shards([str(theirs)]) == both
    assert expand_shards([str(tmp_path / "list.txt")]) == both[::-1]
    assert expand_shards(["https://host/a-{00..02}.tar"]) == [f"https://host/a-0{i}.tar" for i in range(3)]


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("{dir}/gone.tar", "no such file"),
        ("{dir}/part-{{000..000}}{{,,}}.tar", "twice"),
        ("{dir}/part-{{000..001.tar", "braces do not match"),
        ("https://host/{{0..99999999999}}.tar", f"more than {MAX_SHARDS} tars"),
        ("https://host/" + "{{a,b}}" * 40 + ".tar", f"more than {MAX_SHARDS} tars"),
        ("pipe:cat {dir}/part-000.tar", "pipe"),
        ("https://host/a.tar?X-Amz-Signature=canary", "https://host/a.tar: has a query"),
        ("{dir}/{{a,{{b,c}}}}.tar", "braces within braces"),
        ("{dir}/" + "{{" * 2000 + "}}" * 2000, "braces within braces"),
        ("{dir}/" + "{{a..z}}" * 6 + ".tar", f"more than {MAX_SHARDS} tars"),
        ("{dir}/..", "names no tar"),
    ],
)
def test_other_patterns_are_refused(theirs: Path, pattern: str, reason: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        expand_shards([pattern.format(dir=theirs)])


def test_a_list_that_names_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="names another list"):
        expand_shards([str(tmp_path / "list.txt")])
