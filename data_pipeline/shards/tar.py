"""Tar archives, read strictly: every byte of the file is accounted for, and nothing but plain files has content.

Python's tarfile takes a damaged header in the middle for the end, unpacks what is compressed, and believes sparse
files; a reader on top of it loses samples in silence. Here whatever is not a regular, uncompressed tar to its very end
is a fault with its place. The formats ustar, pax and GNU long names are understood: WebDataset writers produce them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = tarfile.BLOCKSIZE
END_BYTES = 2 * BLOCK_BYTES  # POSIX: an archive ends with two blocks of zeros
MAX_EXTENSION_BYTES = 64 * 1024  # of one pax header or GNU long name; real ones have a few hundred
MAX_EXTENSIONS = 4  # before one member; real ones are at most two
MAX_NAME_CHARACTERS = 255
ZEROS_BYTES = 2**20  # read at once while the rest of a file is checked to be zeros
REFUSED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}

Read = Callable[[int, int], bytes]  # (position, size) -> that many bytes of the file, or fewer at its end


class TarFault(ValueError):
    """A fault in a tar, with its place in the file. The file's name is left to whoever reads the file."""


@dataclass(frozen=True)
class TarMember:
    """One member: it begins at byte `start`, and its `size` bytes of content at byte `content`."""

    name: str
    start: int  # of its first header; pax headers and long names come before its own
    content: int
    size: int
    is_file: bool  # or else a folder

    @property
    def stop(self) -> int:
        """The position behind the last byte of content; padding to whole blocks follows."""
        return self.content + self.size


@dataclass
class _Extensions:
    """Facts about a member that extended headers state before its own header."""

    start: int
    name: str | None = None
    size: int | None = None
    count: int = 0


def walk_tar(read: Read, total: int) -> Iterator[TarMember]:
    """Yield the members of a tar of `total` bytes, in order. Raises TarFault where it stops being a tar."""
    position = 0
    extensions = _Extensions(0)
    while any(header := _header(read, position, total)):
        info = _parse_header(header, position)
        content = position + BLOCK_BYTES
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            position = _read_extension(read, info, content, total, extensions)
            continue
        size = info.size if extensions.size is None else extensions.size
        name = info.name if extensions.name is None else extensions.name
        _check_member(name, info.type, size, position)
        if content + _padded(size) > total:
            raise TarFault(f"{name!r} at byte {position} claims {size} bytes, the file ends at byte {total}")
        is_file = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
        yield TarMember(name, extensions.start, content, size, is_file)
        position = content + _padded(size)
        extensions = _Extensions(position)
    if extensions.count:
        raise TarFault(f"it ends at byte {position} after a header that announces a member")
    _check_end(read, position, total)


def member_name(headers: bytes) -> str:
    """Read the name in the headers of one member, given its bytes from `start` to `content`."""
    if len(headers) == BLOCK_BYTES and not headers[345]:  # the usual case: all of the name is in its first field
        return headers[:100].split(b"\0", 1)[0].decode()
    extensions, position = _Extensions(0), 0
    read = bytes_reader(headers)
    while position + BLOCK_BYTES < len(headers):
        info = _parse_header(headers[position : position + BLOCK_BYTES], position)
        position = _read_extension(read, info, position + BLOCK_BYTES, len(headers), extensions)
    return extensions.name or _parse_header(headers[position:], position).name


def bytes_reader(content: bytes) -> Read:
    """Return what `walk_tar` reads bytes in memory by."""
    return lambda position, size: content[position : position + size]


def _header(read: Read, position: int, total: int) -> bytes:
    header = read(position, BLOCK_BYTES)
    if len(header) < BLOCK_BYTES:
        raise TarFault(f"it ends at byte {total} without the two blocks of zeros that end a tar")
    return header


def _parse_header(header: bytes, position: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")  # a long name is cut anywhere here
    except (tarfile.HeaderError, ValueError) as error:
        raise TarFault(f"no tar header at byte {position} ({error})") from error
    if info.size < 0:
        raise TarFault(f"{info.name!r} at byte {position} claims {info.size} bytes")
    return info


def _check_member(name: str, kind: bytes, size: int, position: int) -> None:
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        what = REFUSED_TYPES.get(kind, f"of type {kind!r}")
        raise TarFault(f"{name!r} at byte {position} is {what}, accepted are plain files")
    if kind == tarfile.DIRTYPE and size:
        raise TarFault(f"folder {name!r} at byte {position} claims {size} bytes of content")
    is_plain = name and name.isprintable() and len(name) <= MAX_NAME_CHARACTERS
    if not is_plain or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise TarFault(
            f"member name {name[:80]!r} at byte {position}, accepted are relative names of printable characters, at"
            f" most {MAX_NAME_CHARACTERS}, without '..'"
        )


def _read_extension(read: Read, info: tarfile.TarInfo, content: int, total: int, extensions: _Extensions) -> int:
    """Note what a pax header or GNU long name says of the member behind it, and return where the next header is."""
    extensions.count += 1
    place = f"the extended header at byte {content - BLOCK_BYTES}"
    if extensions.count > MAX_EXTENSIONS:
        raise TarFault(f"{place} is number {extensions.count} of one member, at most {MAX_EXTENSIONS} are accepted")
    if info.size > MAX_EXTENSION_BYTES or content + info.size > total:
        raise TarFault(f"{place} claims {info.size} bytes, at most {MAX_EXTENSION_BYTES} are accepted")
    data = read(content, info.size)
    try:
        if info.type == tarfile.GNUTYPE_LONGNAME:
            extensions.name = data.rstrip(b"\0").decode()
        else:
            _note_pax(dict(_pax_records(data)), extensions, is_global=info.type == tarfile.XGLTYPE)
    except ValueError as error:
        raise TarFault(f"{place} is malformed ({error})") from error
    return content + _padded(info.size)


def _note_pax(records: dict[str, str], extensions: _Extensions, *, is_global: bool) -> None:
    refused = [key for key in records if key.startswith("GNU.sparse") or (is_global and key in ("path", "size"))]
    if refused:
        raise ValueError(f"{refused[0]} is not accepted")
    extensions.name = records.get("path", extensions.name)
    if "size" in records:
        if not records["size"].isdecimal() or len(records["size"]) > 18:
            raise ValueError(f"size is {records['size'][:20]!r}")
        extensions.size = int(records["size"])


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the records "length keyword=value\\n" of a pax header. The length counts the whole record."""
    while data:
        digits = data[:8].split(b" ", 1)[0]
        if not digits.isdigit() or not len(digits) + 3 <= int(digits) <= len(data):
            raise ValueError(f"no record length in {data[:8]!r}")
        record, data = data[: int(digits)], data[int(digits) :]
        keyword, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if record[-1:] != b"\n" or not equals:
            raise ValueError(f"no record in {record[:20]!r}")
        yield keyword.decode(), value.decode()


def _check_end(read: Read, position: int, total: int) -> None:
    """Check that zeros, at least two blocks of them, follow the last member to the end: a hole looks like an end."""
    if total - position < END_BYTES:
        raise TarFault(f"it ends at byte {total} without the two blocks of zeros that end a tar")
    while position < total:
        size = min(ZEROS_BYTES, total - position)
        if any(read(position, size)):
            raise TarFault(f"there are zeros at byte {position} and data behind them")
        position += size


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
