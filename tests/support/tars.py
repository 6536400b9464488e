"""Tar archives written member by member."""

from __future__ import annotations

import io
import tarfile


def tar_of(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for info, content in members:
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for field, value in more.items():
        setattr(info, field, value)
    return info


def pax_tar(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    data = b"".join(records)
    header = member("PaxHeader", kind, len(data)).tobuf(tarfile.USTAR_FORMAT)
    return header + data.ljust(-(-len(data) // 512) * 512, b"\0") + tar_of((member("a.png"), b"x"))
