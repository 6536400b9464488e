"""The table of members says what is in a tar: for ours and for other people's, or what makes it ambiguous."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from tars import member, tar_of
from webdataset.tariterators import base_plus_ext

from data_pipeline.shards.members import ROW, SUFFIXES, Sample, Scan, cut_sample, scan_file, split_name
from data_pipeline.shards.tar import TarFault, bytes_reader


def scan(content: bytes) -> tuple[list[Sample], Scan]:
    found = Scan(bytes_reader(content), len(content))
    return list(found.samples()), found


def test_a_row_takes_33_bytes_and_suffixes_keep_their_numbers() -> None:
    """Tables on disk depend on both."""
    assert ROW.itemsize == 33
    assert SUFFIXES == ("cls", "json", "jpg", "jpeg", "png", "webp", "vq12", "vq16")


def test_rows_lead_back_to_the_samples() -> None:
    content = tar_of((member("a.cls"), b"1"), (member("a.jpg", mtime=1.5), b"x" * 999), (member("d/b.PNG"), b"y"))
    samples, found = scan(content)
    assert samples == [Sample("a", {"cls": b"1", "jpg": b"x" * 999}), Sample("d/b", {"png": b"y"})]
    rows = found.table().tolist()
    for sample, part in zip(samples, (rows[:2], rows[2:])):
        blob = content[part[0][2] : part[-1][3] + part[-1][4]]
        assert cut_sample(blob, part) == sample
        with pytest.raises(TarFault, match="does not match its checksum"):
            cut_sample(blob[:-1] + b"!", part)


def test_what_is_not_read_is_counted() -> None:
    files = {"a.txt": b"", "a.jpg": b"j", "a.seg.png": b"p", ".a.jpg": b"h", "noext": b"", "__m__/a.cls": b"1"}
    members = [(member(name), data) for name, data in files.items()]
    samples, found = scan(tar_of((member("folder/", b"5"), b""), *members))
    assert samples == [Sample("a", {"jpg": b"j"})]
    assert found.ignored == {"folders": 1, ".txt": 1, ".seg.png": 1, "names without a suffix": 3}


@pytest.mark.parametrize(
    "names, reason",
    [
        (["a.jpg", "a.jpg"], "two members a.jpg"),
        (["a.jpg", "a.JPG"], "two members a.jpg"),
        (["a.jpg", "b.jpg", "a.cls", "b.cls"], "sample a goes on at byte 2048"),
    ],
)
def test_ambiguous_samples_are_a_fault(names: list[str], reason: str) -> None:
    with pytest.raises(TarFault, match=reason):
        scan(tar_of(*((member(name), b"x") for name in names)))


@given(st.text("ab./_X", min_size=1, max_size=12).map(lambda name: name.strip("/")))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    theirs = base_plus_ext(name)
    key, suffix = split_name(name)
    if key:
        assert (key, suffix) == (theirs[0], theirs[1].lower())


def test_the_samples_of_webdatasets_writer_are_found(tmp_path: Path) -> None:
    path = tmp_path / "theirs.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:03d}", "cls": number, "jpg": bytes([number]) * 700, "txt": "words"})
    samples: list[Sample] = []
    found = scan_file(path, samples.append)
    stored = webdataset.WebDataset(str(path), shardshuffle=False)
    assert samples == [Sample(one["__key__"], {"cls": one["cls"], "jpg": one["jpg"]}) for one in stored]
    assert found.num_samples == 5 and found.ignored == {".txt": 5}
