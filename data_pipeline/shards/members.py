"""The table of a shard's members: where each lies, how large it is, and its checksum. A file beside the index.

The table is made by reading the finished tar from its first to its last byte. It tells damage from the end of the data,
which a tar alone cannot. It has one row per member, 33 bytes, little endian; the checksum is XXH3 over headers and
content, so that a changed name shows as well as a changed picture. In code shards a reader wants one view at a time, so
a row goes on with the checksum of every view, 8 bytes each. The index seals the table with its sha256. XXH3 finds
damage, not tampering: the shard's own sha256 is for that.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest as checksum_of

from data_pipeline.shards.tar import Read, TarFault, TarMember, member_name, walk_tar

SUFFIXES = ("cls", "json", "jpg", "jpeg", "png", "webp", "vq12", "vq16")  # all that is ever read; in the file by number
MAX_KINDS, OTHER_KINDS = 50, "other suffixes"  # of what is not read in a tar: kinds that are told apart, and the rest
MAX_MEMBER_BYTES = 64 * 2**20
MAX_TABLE_BYTES = 32 * 2**20  # of one shard: a million members, or 200,000 of 16 views
MAX_GAP_BYTES = 64 * 1024  # read along with the members of a sample, though nobody asked for it
MEMBERS_SUFFIX = ".members"  # in place of .tar
ROW = np.dtype(
    [
        ("sample", "<u4"),  # number within the shard
        ("suffix", "u1"),  # index into SUFFIXES
        ("start", "<u8"),  # first byte of the member's headers
        ("content", "<u8"),  # first byte of what is in it
        ("size", "<u4"),  # bytes of content
        ("checksum", "<u8"),  # XXH3 of the bytes from start to the end of the content
    ]
)


def row_type(parts: int) -> np.dtype:
    """Return the type of a row whose member has `parts` equal parts, each with a checksum. 0: just ROW."""
    return np.dtype([*ROW.descr, ("parts", "<u8", (parts,))]) if parts else ROW


def most_members(parts: int) -> int:
    """Return how many members of so many parts a shard may have: those that its table has room for."""
    return MAX_TABLE_BYTES // row_type(parts).itemsize


class Sample(NamedTuple):
    """One sample: a key without dots, and its members by suffix without dot ("cls", "png", "vq12")."""

    key: str
    members: dict[str, bytes]


@dataclass
class Scan:
    """Reads a tar sample by sample, and keeps the rows of its table.

    In other people's tars, folders, hidden members and members with other suffixes are not read, but counted. To
    WebDataset all that stands after the first dot of a name is its suffix, so `img.v2.jpg` has the suffix v2.jpg.
    """

    read: Read
    total: int
    parts: int = 0  # equal ones of every member, each of which is to have a checksum; 0: none
    ignored: Counter[str] = field(default_factory=Counter)  # by suffix
    num_samples: int = 0
    _strays: dict[str, str] = field(
        default_factory=dict
    )  # key without a sample -> its first picture, which was not read
    _rows: list[tuple[Any, ...]] = field(default_factory=list)
    _keys: set[str] = field(default_factory=set)

    def samples(self) -> Iterator[Sample]:
        """Yield every sample in order. Raises TarFault for a damaged tar, and for samples that are ambiguous."""
        current: Sample | None = None
        for member in walk_tar(self.read, self.total):
            key, suffix = split_name(member.name)
            if not member.is_file or not key or suffix not in SUFFIXES:
                self._ignore(member, key, suffix)
                continue
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current = self._begin(key, member)
            if suffix in current.members:
                raise TarFault(f"two members {key}.{suffix}, the second at byte {member.start}")
            current.members[suffix] = self._content(member, suffix)
        if current is not None:
            yield current

    def lost_pictures(self) -> list[str]:
        """List pictures of which nothing was read, because dots in their names make them no member of a sample."""
        return list(self._strays.values())

    def _ignore(self, member: TarMember, key: str, suffix: str) -> None:
        kind = _kind(member, suffix)
        self.ignored[kind if kind in self.ignored or len(self.ignored) < MAX_KINDS else OTHER_KINDS] += 1
        if key and suffix.rpartition(".")[2] in SUFFIXES[2:6] and key not in self._keys:
            self._strays.setdefault(key, member.name)

    def table(self) -> np.ndarray:
        """Return the rows of all members read so far. -> (members,) of row_type(parts)"""
        return np.array(self._rows, dtype=row_type(self.parts))

    def _begin(self, key: str, member: TarMember) -> Sample:
        if key in self._keys:
            raise TarFault(f"sample {key} goes on at byte {member.start}, after others; its members must be neighbours")
        self._keys.add(key)
        self._strays.pop(key, None)
        self.num_samples += 1
        return Sample(key, {})

    def _content(self, member: TarMember, suffix: str) -> bytes:
        if member.size > MAX_MEMBER_BYTES:
            raise TarFault(f"{member.name} has {member.size} bytes, at most {MAX_MEMBER_BYTES} are accepted")
        data = self.read(member.start, member.stop - member.start)
        if len(data) != member.stop - member.start:
            raise TarFault(f"it ends inside {member.name}")
        content = data[member.content - member.start :]
        place = (member.start, member.content, member.size)
        row = (self.num_samples - 1, SUFFIXES.index(suffix), *place, checksum_of(data))
        self._rows.append((*row, part_checksums(content, self.parts)) if self.parts else row)
        return content


def part_checksums(content: bytes, parts: int) -> list[int]:
    """Return the checksums of the equal parts of a member. A rest that does not divide evenly has none of these."""
    size = len(content) // parts
    return [checksum_of(content[number * size : (number + 1) * size]) for number in range(parts)]


def members_of(rows: np.ndarray) -> list[tuple[int, int, int, int, int, int]]:
    """Convert rows of a table to tuples of the fields of ROW, which is what `read_sample` takes."""
    return rows[list(ROW.names or ())].tolist()


def read_sample(read: Read, rows: list[tuple[int, int, int, int, int, int]], *, check: bool = True) -> Sample:
    """Read one sample by its rows of the table: at once, unless something large that is not wanted lies between.

    Raises TarFault naming a member that was changed, and what `read` raises.
    """
    start, stop = rows[0][2], rows[-1][3] + rows[-1][4]
    if len(rows) == 1 or stop - start <= MAX_GAP_BYTES + sum(row[3] + row[4] - row[2] for row in rows):
        return cut_sample(read(start, stop - start), rows, check=check)
    parts = [cut_sample(read(row[2], row[3] + row[4] - row[2]), [row], check=check) for row in rows]
    return Sample(parts[0].key, {suffix: data for part in parts for suffix, data in part.members.items()})


def cut_sample(blob: bytes, rows: list[tuple[int, int, int, int, int, int]], *, check: bool = True) -> Sample:
    """Cut a sample out of its bytes by its rows of the table. Raises TarFault naming a member that was changed."""
    start, whole = rows[0][2], memoryview(blob)
    members: dict[str, bytes] = {}
    for sample, suffix, begin, content, size, checksum in rows:
        stop = content + size - start
        if check and checksum_of(whole[begin - start : stop]) != checksum:
            raise TarFault(f"member {SUFFIXES[suffix]} of sample {sample} at byte {begin} does not match its checksum")
        members[SUFFIXES[suffix]] = blob[content - start : stop]
    name = member_name(blob[: rows[0][3] - start])
    return Sample(name[: name.find(".", name.rfind("/") + 1)], members)


def split_name(name: str) -> tuple[str, str]:
    """Split a name into key and lower-case suffix as WebDataset does, at the first dot of the name's last part.

    Both are empty for what WebDataset skips: names without a dot or that begin with one, and `__meta__` parts.
    """
    folder, slash, file = name.rpartition("/")
    base, dot, suffix = file.partition(".")
    parts = (*folder.split("/"), file)
    is_meta = any(len(part) > 4 and part.startswith("__") and part.endswith("__") for part in parts)
    if not base or not dot or is_meta:
        return "", ""
    return f"{folder}{slash}{base}", suffix.lower()


def _kind(member: TarMember, suffix: str) -> str:
    """Name the kind that an ignored member is counted as."""
    if not member.is_file:
        return "folders"
    return f".{suffix}"[:40] if suffix else "names without a suffix"


def file_reader(descriptor: int) -> Read:
    """Return what `Scan` reads an open file by."""

    def read(position: int, size: int) -> bytes:
        return os.pread(descriptor, size, position)

    return read


def scan_file(path: Path, visit: Callable[[Sample], None] = lambda sample: None, *, parts: int = 0) -> Scan:
    """Read a whole tar, showing every sample to `visit`. Raises TarFault naming the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        scan = Scan(file_reader(descriptor), os.fstat(descriptor).st_size, parts)
        for sample in scan.samples():
            visit(sample)
        return scan
    except TarFault as fault:
        raise TarFault(f"{path}: {fault}") from fault
    finally:
        os.close(descriptor)
