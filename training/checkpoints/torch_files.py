"""torch's .pth files, read without unpickling anything.

Such a file is a zip archive of raw storages, and a pickle that says how they make up a state dict. Here that pickle is
only parsed: a small machine follows the few instructions that a state dict needs, knows no way to call anything, and
every claim about a tensor is checked against the bytes that are there before memory is asked for.
"""

from __future__ import annotations

import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_RECORDS = 20_000
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_PROGRAM_BYTES = 16 * 2**20
MAX_INSTRUCTIONS = 1_000_000  # 40 or so for each tensor
MAX_DIMENSIONS = 16
LOCAL_HEADER, END, END_64, LOCATOR_64 = 30, 22, 56, 20  # bytes of the fixed parts of a zip
RESAVE = "save its state dict as safetensors where you trust it"
TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    record: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of one tensor; nothing of it is checked yet."""

    storage: _Storage
    offset: int  # in elements, as the strides
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class TorchFile:
    """What a .pth file holds: plain values, and tensors that are read when asked for."""

    content: Any
    _memory: mmap.mmap
    _places: dict[str, tuple[int, int]]  # of each record: where its bytes begin, and their number

    @classmethod
    def open(cls, path: Path) -> TorchFile:
        """Read what the file says.

        Raises:
            OSError: it cannot be read.
            ValueError: no file of torch's, or it holds more than plain values and tensors.
        """
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("it is empty")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # mapped, so that big files cost no memory
        try:
            places = _records(path, memory)
            begin, length = places.get("data.pkl", (0, 0))
            if not 0 < length <= MAX_PROGRAM_BYTES:
                raise ValueError(f"data.pkl has {length} bytes, 1 to {MAX_PROGRAM_BYTES} are accepted")
            begin_order, length_order = places.get("byteorder", (0, 0))
            if length_order and memory[begin_order : begin_order + min(length_order, 16)] != b"little":
                raise ValueError("it was written on a machine of another byte order")
            return cls(_Machine(memory[begin : begin + length]).run(), memory, places)
        except (zipfile.BadZipFile, struct.error, LookupError, TypeError, NotImplementedError, OverflowError) as error:
            raise ValueError(f"damaged ({type(error).__name__})") from None

    def tensor(self, stored: StoredTensor) -> Tensor:
        """One tensor, on the CPU, as a view of the file. Raises ValueError if the file does not hold what it claims."""
        storage = stored.storage
        begin, length = self._places.get(f"data/{storage.record}", (0, -1))
        if storage.num_elements * storage.dtype.itemsize != length:
            held = f"{length} bytes" if length >= 0 else "nothing"
            raise ValueError(f"claims {storage.num_elements} elements of {storage.dtype}, there is {held} for them")
        if not _fits(stored):
            raise ValueError(f"claims a size of {list(stored.size)} on {storage.num_elements} elements")
        if math.prod(stored.size) == 0:
            return torch.empty(stored.size, dtype=storage.dtype)
        if begin % storage.dtype.itemsize:  # a copy for each tensor of a large storage would be a bomb
            raise ValueError(f"record data/{storage.record} is not aligned; save the file with torch again")
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=length, offset=begin)
        return flat.view(storage.dtype).as_strided(stored.size, stored.stride, stored.offset)


def _fits(stored: StoredTensor) -> bool:
    """Whether a tensor lies within its storage, each of its elements in a place of its own."""
    numbers = (*stored.size, *stored.stride, stored.offset)
    if any(type(number) is not int or number < 0 for number in numbers):
        return False
    if len(stored.size) != len(stored.stride) or len(stored.size) > MAX_DIMENSIONS:
        return False
    last = stored.offset + sum((size - 1) * step for size, step in zip(stored.size, stored.stride, strict=True))
    count, available = math.prod(stored.size), stored.storage.num_elements
    return count == 0 or (last < available and count <= available)


def _records(path: Path, memory: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Where the records of the archive lie. Raises ValueError unless they are stored as they are, one after another."""
    count, start = _directory(memory)
    if count > MAX_RECORDS or len(memory) - start > MAX_DIRECTORY_BYTES:
        raise ValueError(f"{count} records, at most {MAX_RECORDS} are accepted")
    with zipfile.ZipFile(path) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"record {info.filename[:80]!r} is compressed or encrypted; torch writes none such")
        folder, _, name = info.filename.partition("/")
        if not folder or not name or ".." in info.filename or "\\" in info.filename or name in places:
            raise ValueError(f"a record is named {info.filename[:80]!r}")
        signature, name_length, extra = struct.unpack_from("<4s22xHH", memory, info.header_offset)
        begin = info.header_offset + LOCAL_HEADER + name_length + extra
        if signature != b"PK\3\4" or info.header_offset < end or begin + info.file_size > start:
            raise ValueError(f"record {info.filename[:80]!r} overlaps others")
        end = begin + info.file_size
        places[name] = (begin, info.file_size)
    return places


def _directory(memory: mmap.mmap) -> tuple[int, int]:
    """Number of entries and beginning of a zip's directory, which must end where torch ends it."""
    if memory[:4] != b"PK\3\4":
        raise ValueError(f"no zip archive, as torch writes since 1.6; older formats are not read: {RESAVE}")
    at = len(memory) - END
    signature, count, size, start, comment = struct.unpack_from("<4s6xHIIH", memory, at)
    if signature != b"PK\5\6" or comment:
        raise ValueError("cut short, or something is appended")
    if at >= LOCATOR_64 and memory[at - LOCATOR_64 : at - LOCATOR_64 + 4] == b"PK\6\7":
        at -= LOCATOR_64 + END_64
        signature, count, size, start = struct.unpack_from("<4s28xQQQ", memory, at)
        if signature != b"PK\6\6":
            raise ValueError("its directory is damaged")
    if start + size != at:
        raise ValueError("its directory is damaged")
    return count, start


_MARK = object()


@dataclass(frozen=True)
class _Named:
    """A name of Python's that the pickle refers to."""

    name: str


class _Machine:
    """Follows the instructions of a pickle that make plain values; any other is refused by name."""

    def __init__(self, program: bytes) -> None:
        self.program = program
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for number, (code, argument, _) in enumerate(pickletools.genops(self.program)):
            if number > MAX_INSTRUCTIONS:
                raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions; {RESAVE}")
            if code.name == "STOP":
                return self.stack.pop()
            if code.name in CONSTANTS:
                self.stack.append(argument)
            elif code.name in ACTIONS:
                ACTIONS[code.name](self, argument)
            else:
                raise ValueError(f"it has the pickle instruction {code.name}, which no state dict needs; {RESAVE}")
        raise ValueError("cut short")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def name(self, argument: str) -> None:
        self.push(_Named(argument.replace(" ", ".")))
        if self.stack[-1].name not in CALLS and _storage_type(self.stack[-1]) is None:
            raise ValueError(f"it holds a pickled {self.stack[-1].name[:80]}, which could run code; {RESAVE}")

    def store(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("damaged: no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(values)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) is not dict or type(key) not in (str, int):
                raise ValueError(f"damaged: a key that is a {type(key).__name__}")
            target[key] = value

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("damaged: items without a list")
        self.stack[-1].extend(items)

    def call(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, _Named) or called.name not in CALLS:
            raise ValueError("damaged: a call of what cannot be called")
        self.push(CALLS[called.name](*arguments))

    def forget(self, _: Any) -> None:
        self.stack.pop()  # a state dict's versions of its modules

    def persistent(self, _: Any) -> None:
        kind, of, record, _place, num_elements = self.stack.pop()
        dtype = _storage_type(of)
        if kind != "storage" or dtype is None or type(record) is not str or type(num_elements) is not int:
            raise ValueError("damaged: a storage of no known kind")
        self.push(_Storage(record, dtype, num_elements))


def _storage_type(value: Any) -> torch.dtype | None:
    return TYPES.get(value.name.removeprefix("torch.")) if isinstance(value, _Named) else None


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if type(storage) is not _Storage or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("damaged: a tensor without a storage")
    return StoredTensor(storage, offset, size, stride)


CALLS: dict[str, Callable[..., Any]] = {  # what the names stand for here; nothing of that name is ever looked up
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes: sizes,
}
CONSTANTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "MARK": lambda machine, _: machine.push(_MARK),
    "GLOBAL": _Machine.name,
    "BINPUT": _Machine.store,
    "LONG_BINPUT": _Machine.store,
    "BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.push(machine.memo[index]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.forget,
    "BINPERSID": _Machine.persistent,
}
