"""Files of weights that are damaged, hostile, or bombs, by name: how each is made, and what the error says of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
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


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def huge(value: bytes) -> bytes:
    """A pickle of a dict with one entry."""
    return b"}" + text("huge") + value + b"s"


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, record: str = "0") -> bytes:
    """The part of a pickle that makes a tensor of a claimed size, on a record of 24 bytes."""
    place = text("storage") + b"ctorch\nFloatStorage\n" + text(record) + text("cpu") + integer(numel)
    layout = integer(offset) + b"".join(b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n((" + place + b"tQ" + layout + hooks + b"tR"


def claiming(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, record: str = "0") -> Make:
    """A .pth of one tensor that claims a size, on a record of 24 bytes."""
    return bytes_file("a.pth", archive(program(huge(tensor(numel, size, stride, offset, record)))))


def copied() -> bytes:
    """A pickle that lets torch write out a tensor which repeats one element 4 * 10^8 times."""
    arguments = tensor(6, (20_000, 20_000), (0, 0)) + b"ctorch\nfloat64\n" + text("cpu") + b"\x89"
    return huge(b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + arguments + b"tR")


def safetensors(header: Any, data: bytes = bytes(24), length: int | None = None) -> Callable[[], bytes]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda: struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: tuple[int, ...] = (6,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def old_format(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "a.pth", _use_new_zipfile_serialization=False)
    return folder / "a.pth"


REFUSED: dict[str, tuple[Make, str]] = {
    "empty .pth": (bytes_file("a.pth", lambda: b""), "no zip archive"),
    ".pth of before torch 1.6": (old_format, "no zip archive, which torch has written since version 1.6"),
    "cut .pth": (edited(lambda data: data[: len(data) // 2]), "cut short"),
    ".pth behind something else": (edited(lambda data: b"PK\3\4" + data), "something stands before it"),
    "zip of something else": (bytes_file("a.pth", archive({"a/b.txt": b"text"})), "one data.pkl"),
    ".pth with a nonsense pickle": (bytes_file("a.pth", archive(program(b"\xff\xff"))), "no torch file"),
    ".pth with an endless pickle": (
        bytes_file("a.pth", archive({"archive/data.pkl": b"\x80\x02}"})),
        "pickle exhausted before seeing STOP",
    ),
    ".pth with a pickle twice": (
        bytes_file("a.pth", archive({"archive/data.pkl": b"\x80\x02}.", "other/data.pkl": b"\x80\x02}."})),
        "one data.pkl",
    ),
    ".pth with an absolute record": (bytes_file("a.pth", archive(program(b"}") | {"/etc/x": b"1"})), "/etc/x"),
    ".pth without a storage": (claiming(6, (6,), (1,), record="7"), "data/7"),
    ".pth with a negative size": (claiming(6, (-6,), (1,)), "no torch file"),
    ".pth with a stride too many": (claiming(6, (2,), (1, 1)), "no torch file"),
    ".pth that reads behind its storage": (claiming(6, (6,), (1,), offset=3), "no torch file"),
    ".pth that reads elements twice": (claiming(6, (2, 2, 2), (0, 1, 1)), "size of [2, 2, 2] without the bytes"),
    "empty safetensors": (bytes_file("a.safetensors", lambda: b""), "cut short"),
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
        "a pickled posix.mkdir, which is no part of a state dict",
    ),
    "a class by its name on the stack": (
        bytes_file("a.pth", archive(program(b"X\x05\x00\x00\x00posixX\x05\x00\x00\x00mkdir\x93"))),
        "holds more than a state dict",
    ),
    "an instance": (
        bytes_file("a.pth", archive(program(b"(X\x06\x00\x00\x00canaryiposix\nmkdir\n"))),
        "holds more than a state dict",
    ),
    "an extension": (bytes_file("a.pth", archive(program(b"\x82\x01"))), "holds more than a state dict"),
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
        bytes_file("a.pth", archive(program(b"]" * 2**26), zipfile.ZIP_DEFLATED)),
        "compressed",
    ),
    "a storage of 10^12 elements": (claiming(10**12, (10**12,), (1,)), "no torch file"),
    "a size that overflows": (claiming(6, (2**62, 4), (1, 1)), "no torch file"),
    "an expanded tensor of 10^12 elements": (
        claiming(6, (10**6, 10**6), (0, 0)),
        "entry 'huge' claims a size of [1000000, 1000000] without the bytes",
    ),
    "an expanded tensor that torch would copy": (
        bytes_file("a.pth", archive(program(copied()))),
        "a pickled torch._utils._rebuild_device_tensor_from_cpu_tensor",
    ),
    "an array of 10 GB": (
        bytes_file("a.pth", archive(program(huge(b"cbuiltins\nbytearray\n(" + integer(10**10) + b"tR")))),
        "a pickled builtins.bytearray",
    ),
    "a tensor of 4 GB": (
        bytes_file("a.pth", archive(program(huge(b"ctorch\nTensor\n(" + integer(10**9) + b"tR")))),
        "a pickled torch.Tensor",
    ),
    "a memo of 2^32": (bytes_file("a.pth", archive(program(b"}r\xff\xff\xff\xff0"))), "holds more than a state dict"),
    "very many lists": (bytes_file("a.pth", archive(program(b"]" * 300_000))), "holds a list"),
    "more lists than that": (bytes_file("a.pth", archive(program(b"]" * 1_100_000))), "at most 1048576 bytes"),
    "a text of 4 GB": (bytes_file("a.pth", archive(program(b"X\xff\xff\xff\xffabc"))), "expected 4294967295 bytes"),
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
