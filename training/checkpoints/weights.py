"""Weights that come from elsewhere, read as state dicts: .safetensors files, and the .pth files of torch.

Nothing in them is ever run: torch's restricted unpickler follows the pickle of a .pth file. Its tensors are mapped from
the file, so that they cost no memory until they are used. The checks around it bound the memory that a hostile file
takes, which neither library does: the unpickler makes an array of any size and copies a tensor that repeats one element
without end, and safetensors takes headers of any size, and a name given twice.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.files.strict_json import parse_json

MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file: some 50,000 tensors
MAX_PICKLE_BYTES = 2**20  # of a .pth file: some 5,000 tensors; what it describes takes up to 70 times its bytes
PUBLIC_TRAINER_KEYS = {"VAR": "var_wo_ddp", "VQVAE": "vae_local"}  # where the public trainer's checkpoints have them
STATE_DICT_PARTS = re.compile(  # the names that a pickle may hold, as its instruction GLOBAL has them
    r"collections OrderedDict|torch Size|torch\._utils (_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
RESAVE = "get it again, or save its state dict as safetensors where you trust it"


def read_weights(path: str | Path, kind: str = "", entry: str = "") -> dict[str, Tensor]:
    """Return the state dict in a .pth, .pt or .safetensors file, on the CPU.

    A state dict that stands alone in a file of several entries, such as {'state_dict': ...} or {'model': ...} beside
    numbers, is taken; the prefixes that DistributedDataParallel and torch.compile put before all names are dropped.

    kind: "VAR" or "VQVAE"; which of the two to take from a checkpoint of the public trainer, which holds both. entry:
    the name of the state dict to take where a file holds several.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds more than tensors, claims more bytes than it has, or is no flat dict; or
            it holds several state dicts, or none named `entry`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {_what_it_is(path)}; weights come as a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        return _without_prefixes(load_safetensors(path))
    content = _load_torch_file(path)
    if isinstance(content, dict) and isinstance(content.get("trainer"), dict):
        content = _from_trainer(path, content["trainer"], kind)
    return _without_prefixes(_flat_tensors(path, _state_dict_in(path, content, entry)))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file. Raises ValueError that names the file if it is damaged."""
    try:
        check_header(path)
        return load_file(path)
    # the library's own errors, and what torch raises where header and tensors do not agree
    except (SafetensorError, ValueError, RuntimeError, TypeError, LookupError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); get or export it again") from None


def check_header(path: Path) -> None:
    """Raise ValueError for a safetensors file whose header is too large or has two meanings."""
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("cut short")
        length = struct.unpack("<Q", head)[0]
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are accepted")
        parse_json(file.read(length))


def _what_it_is(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "no such file"
    return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"


def _load_torch_file(path: Path) -> Any:
    try:
        _check_pickle(_read_pickle(path))
        with warnings.catch_warnings(action="ignore"):  # about pickles of other protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except pickle.UnpicklingError:  # whose text advises to switch the restrictions off
        raise ValueError(f"{path}: its pickle is damaged, or holds more than a state dict; {RESAVE}") from None
    except Exception as error:  # torch lets through whatever its two languages meet in a damaged file
        raise ValueError(f"{path}: no torch file that is read here ({_first_line(error)}); {RESAVE}") from None


def _read_pickle(path: Path) -> bytes:
    """Return the pickle in a .pth file. Raises ValueError unless the file is an archive such as torch writes."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("no zip archive, which torch has written since version 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if records[0].header_offset or any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("compressed, or something stands before it")
            pickles = [record for record in records if record.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"one data.pkl of at most {MAX_PICKLE_BYTES} bytes is expected")
            return archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        raise ValueError(f"cut short or damaged: {error}") from None


def _check_pickle(program: bytes) -> None:
    """Raise ValueError if a pickle refers to anything but the parts of a state dict."""
    for code, argument, _ in pickletools.genops(program):
        if code.name == "GLOBAL" and not STATE_DICT_PARTS.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".")[:80]
            raise ValueError(f"it holds a pickled {name}, which is no part of a state dict")


def _from_trainer(path: Path, trainer: dict[Any, Any], kind: str) -> Any:
    wanted = PUBLIC_TRAINER_KEYS.get(kind)
    if wanted not in trainer:
        held = ", ".join(str(name)[:40] for name in list(trainer)[:20] if isinstance(name, str))
        raise ValueError(f"{path}: a trainer's checkpoint with {held}; it has no {wanted or 'single model'} to take")
    return trainer[wanted]


def _state_dict_in(path: Path, content: Any, entry: str) -> Any:
    """Return the state dict of a file that may hold other things beside it, or several."""
    if not isinstance(content, dict):
        return content
    inside = {name: value for name, value in content.items() if _is_state_dict(value)}
    if entry or len(inside) > 1:
        if entry not in inside:
            held = ", ".join(str(name)[:40] for name in inside) or "no state dict inside"
            said = f"has no entry '{entry}'; it holds {held}" if entry else f"holds several models: {held}"
            raise ValueError(f"{path}: {said}; choose one with import_weights.py --entry NAME")
        return inside[entry]
    return next(iter(inside.values())) if inside else content


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _without_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefixes that wrappers put before all names, however many there are."""
    for prefix in WRAPPERS * 2:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _flat_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a dict of names and tensors")
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{path}: has a key that is a {type(name).__name__}; expected a flat dict of named tensors"
            )
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: entry {name[:80]!r} is a {type(value).__name__}, not a tensor; expected a flat state dict: "
                "save the one inside by itself"
            )
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: entry {name[:80]!r} claims a size of {list(value.shape)} without the bytes; {RESAVE}"
            )
    return {name: value.detach() for name, value in content.items()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
