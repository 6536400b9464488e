"""Files of weights that are damaged, hostile, or bombs, by name: how each is made, and what the error says of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, -1.0])}
CANARY = "canary"  # a file that code in a payload would leave where it runs

Make = Callable[[Path], Path]


class Call:
    """Unpickles as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Built:
    """Unpickles as an object whose state is set by a call of its own."""

    def __reduce__(self) -> Any:
        return io.BytesIO, (), {"x": Call(os.mkdir, CANARY)}


def torch_file(folder: Path, content: Any, name: str = "a.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def bytes_file(name: str, content: Callable[[], bytes]) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return make


def payload(content: Callable[[], Any]) -> Make:
    """A .pth whose pickle holds an object."""
    return lambda folder: torch_file(folder, content())


def edited(change: Callable[[bytes], bytes], content: Any = WEIGHTS) -> Make:
    """A .pth whose bytes are changed afterwards."""

    def make(folder: Path) -> Path:
        path = torch_file(folder, content)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Callable[[], bytes]:
    def content() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for name, record in records.items():
                file.writestr(name, record)
        return buffer.getvalue()

    return content


def program(body: bytes) -> dict[str, bytes]:
    """The records of a .pth with a pickle written by hand."""
    return {"archive/data.pkl": b"\x80\x02" + body + b".", "archive/version": b"3\n", "archive/data/0": bytes(24)}


def claiming(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, record: str = "0") -> bytes:
    """A pickle of one tensor that claims a size, on a record of 24 bytes."""

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    text = b"".join(b"X" + struct.pack("<I", len(word)) + word for word in (b"storage",))
    place = b"X" + struct.pack("<I", len(record)) + record.encode() + b"X\x03\x00\x00\x00cpu"
    storage = b"(" + text + b"ctorch\nFloatStorage\n" + place + b"\x8a\x08" + struct.pack("<q", numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"\x8a\x08" + struct.pack("<q", offset)
    tensor += integers(size) + integers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"}X\x04\x00\x00\x00huge" + tensor + b"s"


def overlapping() -> bytes:
    """A zip whose entries all share the same bytes."""
    records = {"archive/data.pkl": pickle.dumps({}, 2), "archive/data/0": bytes(9), "archive/data/1": bytes(9)}
    content = archive(records)()
    directory = content.index(b"PK\1\2")
    entries = content[directory:].split(b"PK\1\2")
    first = struct.unpack_from("<I", entries[2], 38)[0]
    third = bytearray(entries[3])
    third[38:42] = struct.pack("<I", first)
    return content[:directory] + b"PK\1\2".join([entries[0], entries[1], entries[2], bytes(third)])


def safetensors(header: Any, data: bytes = bytes(24), length: int | None = None) -> Callable[[], bytes]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda: struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: tuple[int, ...] = (6,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def legacy_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def old_format(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "a.pth", _use_new_zipfile_serialization=False)
    return folder / "a.pth"


REFUSED: dict[str, tuple[Make, str]] = {
    "empty .pth": (bytes_file("a.pth", lambda: b""), "it is empty"),
    "a web page for a .pth": (bytes_file("a.pth", lambda: b"<html>404</html>"), "no zip archive"),
    ".pth of before torch 1.6": (old_format, "older formats are not read: save its state dict as safetensors"),
    ".pth of before torch 0.4": (bytes_file("a.pth", legacy_tar), "no zip archive"),
    "cut .pth": (edited(lambda data: data[: len(data) // 2]), "cut short"),
    ".pth with something behind it": (edited(lambda data: data + b"more"), "cut short, or something is appended"),
    "zip of something else": (bytes_file("a.pth", archive({"a/b.txt": b"text"})), "data.pkl has 0 bytes"),
    ".pth with a nonsense pickle": (bytes_file("a.pth", archive(program(b"\xff\xff"))), "is no torch file"),
    ".pth with an endless pickle": (
        bytes_file("a.pth", archive({"archive/data.pkl": b"\x80\x02}"})),
        "pickle exhausted before seeing STOP",
    ),
    ".pth with a record twice": (
        bytes_file("a.pth", archive({"archive/data.pkl": b"\x80\x02}.", "other/data.pkl": b"\x80\x02}."})),
        "a record is named 'other/data.pkl'",
    ),
    ".pth with a record outside": (
        bytes_file("a.pth", archive(program(b"}") | {"archive/../../etc/x": b"1"})),
        "a record is named 'archive/../../etc/x'",
    ),
    ".pth with an absolute record": (bytes_file("a.pth", archive(program(b"}") | {"/etc/x": b"1"})), "'/etc/x'"),
    ".pth with shared records": (bytes_file("a.pth", overlapping), "overlaps others"),
    ".pth of the other byte order": (
        bytes_file("a.pth", archive(program(b"}") | {"archive/byteorder": b"big"})),
        "another byte order",
    ),
    ".pth without a storage": (
        bytes_file("a.pth", archive(program(claiming(6, (6,), (1,), record="7")))),
        "entry 'huge' claims 6 elements of torch.float32, there is nothing for them",
    ),
    ".pth with a negative size": (bytes_file("a.pth", archive(program(claiming(6, (-6,), (1,))))), "size of [-6]"),
    ".pth that reads behind its storage": (
        bytes_file("a.pth", archive(program(claiming(6, (6,), (1,), offset=3)))),
        "entry 'huge' claims a size of [6] on 6 elements",
    ),
    "empty safetensors": (bytes_file("a.safetensors", lambda: b""), "cut short"),
    "safetensors that is none": (bytes_file("a.safetensors", lambda: b"not safetensors at all"), "header claims"),
    "cut safetensors": (bytes_file("a.safetensors", lambda: save(WEIGHTS)[:-9]), "cannot be read"),
    "safetensors with overlaps": (
        bytes_file("a.safetensors", safetensors({"a": entry(0, 24), "b": entry(0, 24)})),
        "cannot be read",
    ),
    "safetensors with a gap": (bytes_file("a.safetensors", safetensors({"a": entry(4, 28)}, bytes(28))), "cannot be"),
    "safetensors beyond its end": (bytes_file("a.safetensors", safetensors({"a": entry(0, 2**40)})), "cannot be read"),
    "safetensors of a wrong shape": (bytes_file("a.safetensors", safetensors({"a": entry(0, 24, (7,))})), "cannot be"),
    "safetensors of an unknown type": (
        bytes_file("a.safetensors", safetensors({"a": entry(0, 24) | {"dtype": "F99"}})),
        "cannot be read",
    ),
    "safetensors with a name twice": (
        bytes_file("a.safetensors", safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 24)).encode(),) * 2))),
        "gives 'a' twice",
    ),
    "safetensors with a nested header": (bytes_file("a.safetensors", safetensors(b"[" * 100_000)), "cannot be read"),
    "safetensors with a negative offset": (bytes_file("a.safetensors", safetensors({"a": entry(-24, 0)})), "cannot be"),
}
EXPLOITS: dict[str, tuple[Make, str]] = {
    "os.system": (payload(lambda: WEIGHTS | {"x": Call(os.system, f"touch {CANARY}")}), "a pickled posix.system"),
    "eval": (payload(lambda: WEIGHTS | {"x": Call(eval, f"open('{CANARY}', 'w')")}), "a pickled __builtin__.eval"),
    "open": (payload(lambda: {"x": Call(open, CANARY, "w")}), "a pickled io.open"),
    "os.mkdir in the state of an object": (payload(lambda: {"x": Built()}), "a pickled _io.BytesIO"),
    "torch.load": (payload(lambda: {"x": Call(torch.load, "b.pth")}), "a pickled torch.serialization.load"),
    "getattr": (payload(lambda: {"x": Call(getattr, "x", "upper")}), "a pickled __builtin__.getattr"),
    "os.mkdir by hand": (
        bytes_file("a.pth", archive(program(b"cposix\nmkdir\n(X\x06\x00\x00\x00canarytR"))),
        "a pickled posix.mkdir, which could run code",
    ),
    "a class by its name on the stack": (
        bytes_file("a.pth", archive(program(b"X\x05\x00\x00\x00posixX\x05\x00\x00\x00mkdir\x93"))),
        "the pickle instruction STACK_GLOBAL",
    ),
    "an instance": (
        bytes_file("a.pth", archive(program(b"(X\x06\x00\x00\x00canaryiposix\nmkdir\n"))),
        "the pickle instruction INST",
    ),
    "an extension": (bytes_file("a.pth", archive(program(b"\x82\x01"))), "the pickle instruction EXT1"),
    "a plain pickle": (
        bytes_file("a.pth", lambda: pickle.dumps(Call(os.mkdir, CANARY), protocol=2)),
        "no zip archive",
    ),
    "a pickle called safetensors": (
        bytes_file("a.safetensors", lambda: pickle.dumps(Call(os.mkdir, CANARY), protocol=2)),
        "cannot be read",
    ),
}
BOMBS: dict[str, tuple[Make, str]] = {
    "a compressed .pth": (
        bytes_file("a.pth", archive(program(b"}") | {"archive/data/1": bytes(2**26)}, zipfile.ZIP_DEFLATED)),
        "is compressed or encrypted",
    ),
    "a storage of 10^12 elements": (
        bytes_file("a.pth", archive(program(claiming(10**12, (10**12,), (1,))))),
        "entry 'huge' claims 1000000000000 elements of torch.float32, there is 24 bytes for them",
    ),
    "an expanded tensor of 10^12 elements": (
        bytes_file("a.pth", archive(program(claiming(6, (10**6, 10**6), (0, 0))))),
        "entry 'huge' claims a size of [1000000, 1000000] on 6 elements",
    ),
    "a memo of 2^32": (bytes_file("a.pth", archive(program(b"}r\xff\xff\xff\xff0"))), "instruction POP"),
    "a million lists": (bytes_file("a.pth", archive(program(b"]" * 1_000_100))), "more than 1000000 instructions"),
    "a text of 4 GB": (bytes_file("a.pth", archive(program(b"X\xff\xff\xff\xffabc"))), "expected 4294967295 bytes"),
    "twenty thousand records": (
        bytes_file("a.pth", archive(program(b"}") | {f"archive/data/{n}": b"" for n in range(1, 21_000)})),
        "records, at most 20000 are accepted",
    ),
    "a safetensors header of 4 EB": (bytes_file("a.safetensors", safetensors({}, length=2**62)), "its header claims"),
    "a safetensors header of 90 MB": (
        bytes_file("a.safetensors", lambda: struct.pack("<Q", 90 * 10**6) + b"{" + b" " * (90 * 10**6)),
        "its header claims 90000000 bytes",
    ),
    "a safetensors shape of 2^64": (
        bytes_file("a.safetensors", safetensors({"a": entry(0, 24, (2**32, 2**32))})),
        "cannot be read",
    ),
}
