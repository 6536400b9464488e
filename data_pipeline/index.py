"""The index of a packed folder: its shards, their sizes and hashes, and what their writer wants readers to know.

A tar alone cannot tell damage from its own end, so counts, sizes and sha256 are kept beside it. The index is written
last: a folder with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.files import atomic_file

Kind = Literal["images", "codes"]

INDEX_NAME = "index.json"
INDEX_VERSION = 1
REQUIRED_META = {
    "images": ("classes",),
    "codes": ("classes", "patch_nums", "vocab_size", "num_tokens", "bits", "views", "tokenizer_sha256"),
}
SHARD_NAME = re.compile(r"shard-[0-9]{6,9}\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"shard name is {self.name!r}, expected shard-000000.tar or the like")
        for field in ("samples", "bytes"):
            value = getattr(self, field)
            if type(value) is not int or value < 0:
                raise ValueError(f"{self.name}: {field} is {value!r}, expected a count")
        if not isinstance(self.sha256, str) or not SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.name}: sha256 is {self.sha256!r}, expected 64 hex digits")


@dataclass(frozen=True)
class Index:
    """The shards of one packed folder, in order. `meta` is plain JSON and is part of the fingerprint."""

    kind: Kind
    shards: tuple[ShardEntry, ...]
    meta: dict[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}, expected one of {get_args(Kind)}")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")
        if not isinstance(self.meta, dict):
            raise ValueError(f"meta is a {type(self.meta).__name__}, expected a mapping")
        missing = [name for name in REQUIRED_META[self.kind] if name not in self.meta]
        if missing:
            raise ValueError(f"meta of {self.kind} lacks {', '.join(missing)}")

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 of the index in canonical JSON. Equal fingerprints mean equal samples in equal order."""
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def read(cls, folder: Path, *, kind: Kind | None = None) -> Index:
        """Read `folder`/index.json and, if `kind` is given, insist on it.

        Raises FileNotFoundError without folder or index, ValueError if the index is malformed or of another kind.
        """
        path = _existing_index(Path(folder))
        try:
            index = _parse_index(json.loads(path.read_text(encoding="utf-8")))
        except KeyError as error:
            raise ValueError(f"{path}: malformed index, {error} is missing; pack this data again") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: malformed index, {error}; pack this data again") from error
        if kind is not None and index.kind != kind:
            raise ValueError(f"{path}: holds {index.kind}, expected {kind}; correct the path in the config")
        return index

    def write(self, folder: Path) -> None:
        """Write `folder`/index.json in one step: a reader sees the whole index or none."""
        with atomic_file(Path(folder) / INDEX_NAME) as file:
            file.write(json.dumps(self._content(), indent=1).encode() + b"\n")

    def _content(self) -> dict[str, Any]:
        shards = [asdict(shard) for shard in self.shards]
        return {"version": INDEX_VERSION, "kind": self.kind, "shards": shards, "meta": self.meta}


def is_complete(folder: Path) -> bool:
    """True if `folder` was packed to the end."""
    return (Path(folder) / INDEX_NAME).is_file()


def refuse_complete(folder: Path) -> None:
    """Raise ValueError if `folder` already holds packed data."""
    if is_complete(folder):
        raise ValueError(f"{folder}: already packed; delete it or choose another output folder")


def _existing_index(folder: Path) -> Path:
    path = folder / INDEX_NAME
    next_step = "run launchers/pack_images.py or launchers/encode_codes.py, or correct the path in the config"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {next_step}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so this folder was never packed to the end; {next_step}")
    return path


def _parse_index(content: dict[str, Any]) -> Index:
    if content["version"] != INDEX_VERSION:
        raise ValueError(f"version is {content['version']!r}, this program reads version {INDEX_VERSION}")
    return Index(content["kind"], tuple(ShardEntry(**shard) for shard in content["shards"]), content["meta"])
