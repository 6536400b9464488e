"""Files of weights from elsewhere, as state dicts: .safetensors, and torch's .pth. Nothing in them is ever run."""

from __future__ import annotations

import stat
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.files.strict_json import parse_json
from training.checkpoints.torch_files import RESAVE, StoredTensor, TorchFile

MAX_HEADER_BYTES = 8 * 2**20  # of a safetensors file: some 50,000 tensors
PUBLIC_TRAINER_KEYS = {"VAR": "var_wo_ddp", "VQVAE": "vae_local"}  # where the public trainer's checkpoints have them


def read_weights(path: str | Path, kind: str = "") -> dict[str, Tensor]:
    """The state dict in a .pth, .pt or .safetensors file, on the CPU; nothing else in it is ever run.

    kind: "VAR" or "VQVAE", which to take from a checkpoint of the public trainer, which holds both.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, holds more than tensors, claims more than it has, or is no flat state dict.
    """
    path = Path(path)
    if not path.is_file():
        problem = _what_it_is(path)
        raise FileNotFoundError(f"{path}: {problem}; weights come as a .pth, .pt or .safetensors file")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        file = TorchFile.open(path)
    except ValueError as error:
        raise ValueError(f"{path}: is no torch file that is read here: {error}; or get it again") from None
    content = file.content
    if isinstance(content, dict) and isinstance(content.get("trainer"), dict):
        content = _from_trainer(path, content["trainer"], kind)
    return _flat_tensors(path, file, content)


def _what_it_is(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except OSError:
        return "no such file"
    return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises ValueError that names the file if it is damaged."""
    try:
        check_header(path)
        return load_file(path)
    # the library's own errors, and what torch raises where header and tensors do not agree
    except (SafetensorError, ValueError, RuntimeError, TypeError, LookupError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); get or export it again") from None


def check_header(path: Path) -> None:
    """Raise ValueError for a safetensors file whose header is a bomb, or has two meanings: the library takes both."""
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ValueError("cut short")
        length = struct.unpack("<Q", head)[0]
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are accepted")
        parse_json(file.read(length))


def _from_trainer(path: Path, trainer: dict[str, Any], kind: str) -> Any:
    wanted = PUBLIC_TRAINER_KEYS.get(kind)
    if wanted not in trainer:
        held = ", ".join(str(name)[:40] for name in list(trainer)[:20])
        raise ValueError(f"{path}: a trainer's checkpoint with {held}; it has no {wanted or 'single model'} to take")
    return trainer[wanted]


def _flat_tensors(path: Path, file: TorchFile, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: holds a {_type_name(content)}, expected a dict of names and tensors")
    tensors = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise ValueError(
                f"{path}: entry {str(name)[:80]!r} is a {_type_name(value)}, not a tensor; expected a flat state "
                "dict: save the one inside by itself"
            )
        try:
            tensors[name] = file.tensor(value)
        except ValueError as error:
            raise ValueError(f"{path}: entry {name[:80]!r} {error}; {RESAVE}") from None
    return tensors


def _type_name(value: Any) -> str:
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
