"""A tar is walked to its last byte, and nothing that is not a plain, whole, uncompressed tar is taken for one."""

from __future__ import annotations

import contextlib
import gzip
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import member, pax_tar, tar_of

from data_pipeline.shards.tar import TarFault, bytes_reader, member_name, walk_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.text("abcdefghij_-.0123456789\u00e9", min_size=1, max_size=60).filter(lambda name: ".." not in name)


def walk(content: bytes) -> list[tuple[str, bytes]]:
    members = walk_tar(bytes_reader(content), len(content))
    return [(item.name, content[item.content : item.stop]) for item in members if item.is_file]


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, st.binary(max_size=1500), max_size=5), st.sampled_from(sorted(FORMATS)))
def test_what_tarfile_writes_is_walked(files: dict[str, bytes], kind: str) -> None:
    content = tar_of(*((member(name), data) for name, data in files.items()), kind=FORMATS[kind])
    assert walk(content) == list(files.items())


@pytest.mark.parametrize("kind", ["gnu", "pax"])
@pytest.mark.parametrize("name", ["b.png", "a/" * 60 + "b.png", "\u4e2d" * 80 + ".png"])
def test_long_names_and_fractional_times_are_understood(kind: str, name: str) -> None:
    """WebDataset's own writer produces pax headers, since the times it writes are fractions."""
    content = tar_of((member("first.cls"), b"1"), (member(name, mtime=1.5), b"x" * 700), kind=FORMATS[kind])
    assert walk(content) == [("first.cls", b"1"), (name, b"x" * 700)]
    last = list(walk_tar(bytes_reader(content), len(content)))[-1]
    assert member_name(content[last.start : last.content]) == name


GOOD = tar_of((member("a.png"), b"x" * 600), (member("b.png"), b"y"))
CASES = {
    "empty file": (b"", "without the two blocks"),
    "not a tar": (b"x" * 2048, "no tar header at byte 0"),
    "gzip": (gzip.compress(GOOD), "no tar header|without the two blocks"),
    "cut at a member": (GOOD[:1536], "without the two blocks"),
    "cut in a header": (GOOD[:1600], "without the two blocks"),
    "cut in content": (GOOD[:900], "claims 600 bytes, the file ends at byte 900"),
    "one block of zeros": (GOOD[:2560] + bytes(512), "without the two blocks"),
    "hole": (GOOD[:1536] + bytes(512) + GOOD[2048:2560] + bytes(2048), "zeros at byte 1536 and data behind"),
    "flipped header": (GOOD[:1540] + b"!" + GOOD[1541:], "no tar header at byte 1536"),
    "data after the end": (GOOD + b"x", "data behind them"),
    "symbolic link": (tar_of((member("a.png", tarfile.SYMTYPE), b"")), "is a symbolic link"),
    "hard link": (tar_of((member("a.png", tarfile.LNKTYPE), b"")), "is a hard link"),
    "device": (tar_of((member("a.png", tarfile.CHRTYPE), b"")), "is a device"),
    "fifo": (tar_of((member("a.png", tarfile.FIFOTYPE), b"")), "is a pipe"),
    "sparse": (tar_of((member("a.png", tarfile.GNUTYPE_SPARSE), b"")), "is a sparse file"),
    "unknown type": (tar_of((member("a.png", b"Z"), b"")), "is of type"),
    "absolute name": (tar_of((member("/etc/passwd"), b"x")), "member name '/etc/passwd'"),
    "name outside": (tar_of((member("a/../../b.png"), b"x")), "without '..'"),
    "newline in a name": (tar_of((member("a\nb.png"), b"x")), "printable characters"),
    "huge member": (member("a.png", size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(10240), "claims 1099511627776 bytes"),
    "huge name": (member("L", b"L", 2**30).tobuf(tarfile.GNU_FORMAT) + bytes(9999), "at most 65536"),
    "pax size": (pax_tar(b"20 size=99999999999\n"), "claims 99999999999 bytes"),
    "pax sparse": (pax_tar(b"22 GNU.sparse.major=1\n"), "GNU.sparse.major is not accepted"),
    "pax without a length": (pax_tar(b"path=b.png\n"), "no record length"),
    "pax beyond its end": (pax_tar(b"99 path=b.png\n"), "no record length"),
    "global pax path": (pax_tar(b"14 path=b.png\n", kind=tarfile.XGLTYPE), "path is not accepted"),
    "headers without a member": (pax_tar(b"14 path=b.png\n")[:1024] + bytes(1024), "announces a member"),
    "headers without end": (pax_tar(b"14 path=b.png\n")[:1024] * 9, "at most 4"),
}


@pytest.mark.parametrize("content, reason", CASES.values(), ids=CASES)
def test_anything_else_is_a_fault_with_its_place(content: bytes, reason: str) -> None:
    with pytest.raises(TarFault, match=reason) as caught:
        walk(content)
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=20))
def test_overwritten_bytes_are_a_fault_or_a_tar(place: int, noise: bytes) -> None:
    with contextlib.suppress(TarFault):
        walk(GOOD[:place] + noise + GOOD[place + len(noise) :])
