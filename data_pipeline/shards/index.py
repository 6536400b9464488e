"""The index of a packed folder: its shards, their sizes and hashes, and what their writer wants readers to know.

A tar alone cannot tell damage from its own end, so counts, sizes and sha256 are kept beside it. The index is written
last: a folder with an index is complete. It may also name shards that lie elsewhere, by path or URL, and belong to
somebody else. What it says is checked before anything is made of it, since it may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.damage import DamagedData
from data_pipeline.files.strict_json import parse_json
from data_pipeline.remote.remote import check_location, is_url, without_query
from data_pipeline.shards.members import MEMBERS_SUFFIX, most_members
from data_pipeline.shards.storage import Storage

Kind = Literal["images", "codes"]

INDEX_NAME = "index.json"
VERSIONS = {"images": 2, "codes": 3}  # of codes: in 3 a view has a label and a checksum of its own
MAX_INDEX_BYTES = 32 * 2**20
MAX_VIEWS = 4096
MAX_PATCH_NUM = 1024
MIN_SAMPLE_BYTES = 512  # one header
REQUIRED_META = {
    "images": ("classes",),
    "codes": ("classes", "patch_nums", "vocab_size", "num_tokens", "bits", "views", "tokenizer_sha256"),
}
SHARD_NAME = re.compile(r"shard-[0-9]{6,9}\.tar")
PACK_AGAIN = "copy or pack it again, or run launchers/index_shards.py on its shards"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """What the index says about one shard. location: a path or URL; empty: beside the index, under its name."""

    name: str
    samples: int
    bytes: int
    sha256: str
    members_sha256: str  # of the table of members
    location: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"shard name is {self.name!r}, expected shard-000000.tar or the like")
        for field in ("samples", "bytes"):
            value = getattr(self, field)
            if type(value) is not int or not 0 <= value < 2**53:
                raise ValueError(f"{self.name}: {field} is {str(value)[:40]}, expected a count")
        if self.samples * MIN_SAMPLE_BYTES > self.bytes:
            raise ValueError(f"{self.name}: {self.samples} samples cannot be in {self.bytes} bytes")
        for field in ("sha256", "members_sha256"):
            value = getattr(self, field)
            if not isinstance(value, str) or not SHA256.fullmatch(value):
                raise ValueError(f"{self.name}: {field} is {str(value)[:80]!r}, expected 64 hex digits")
        _check_place(self.name, self.location)

    @property
    def members_name(self) -> str:
        """The file beside the index that holds the table of members."""
        return self.name.removesuffix(".tar") + MEMBERS_SUFFIX

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "location" or value}


def _check_place(name: str, location: Any) -> None:
    if not isinstance(location, str) or not location.isprintable():
        raise ValueError(f"{name}: location is {str(location)[:80]!r}, expected a path or URL")
    if is_url(location):
        check_location(location)
        refuse_query(location)
    elif location and (not location.startswith("/") or ".." in location.split("/")):
        raise ValueError(f"{name}: location is {location[:80]!r}, expected an absolute path without '..', or a URL")


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
        classes = self.meta["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("classes is not a list of names")
        if self.kind == "codes":
            _check_codes(self.meta)
        most = most_members(self.record_parts)
        for shard in self.shards:
            if shard.samples > most:
                raise ValueError(f"{shard.name}: {shard.samples} samples, at most {most} fit its table of members")

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def record_parts(self) -> int:
        """In how many parts with checksums of their own a sample is stored: codes in views; 0: as a whole."""
        return self.meta["views"] if self.kind == "codes" else 0

    @property
    def fingerprint(self) -> str:
        """sha256 of the index in canonical JSON, wherever the shards lie. Equal fingerprints mean equal samples."""
        content = self._content()
        content["shards"] = [{**shard, "location": ""} for shard in content["shards"]]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def read(cls, location: str | Path | Storage, *, kind: Kind | None = None) -> Index:
        """Read the index.json of a folder, or of the URL of one, and, if `kind` is given, insist on it.

        Raises FileNotFoundError without folder or index, DamagedData if the index is malformed, ValueError if it is of
        another kind or version.
        """
        storage = location if isinstance(location, Storage) else Storage(location)
        if not storage.is_remote:
            _refuse_missing(Path(storage.location))
        place, content = storage.place_of(INDEX_NAME), storage.read_small(INDEX_NAME, max_bytes=MAX_INDEX_BYTES)
        index = cls.parse(content, place)
        if kind is not None and index.kind != kind:
            raise ValueError(f"{place}: holds {index.kind}, expected {kind}; correct the path in the config")
        return index

    @classmethod
    def parse(cls, content: bytes, place: str) -> Index:
        """An index from the bytes of its file, which errors call `place`. Raises DamagedData if it is malformed."""
        try:
            values = parse_json(content)
            refusal = _version_refusal(values)
            if not refusal:
                return _parse_index(values)
        except KeyError as error:
            raise DamagedData(f"{place}: malformed index, {error} is missing; {PACK_AGAIN}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedData(f"{place}: malformed index, {error}; {PACK_AGAIN}") from error
        raise DamagedData(f"{place}: {refusal}")

    def to_bytes(self) -> bytes:
        """The bytes of its file, JSON."""
        return json.dumps(self._content(), indent=1).encode() + b"\n"

    def write(self, folder: Path) -> None:
        """Write `folder`/index.json in one step: a reader sees the whole index or none."""
        with atomic_file(Path(folder) / INDEX_NAME) as file:
            file.write(self.to_bytes())

    def _content(self) -> dict[str, Any]:
        shards = [shard.to_json() for shard in self.shards]
        return {"version": VERSIONS[self.kind], "kind": self.kind, "shards": shards, "meta": self.meta}


def _check_codes(meta: dict[str, Any]) -> None:
    """Raise ValueError for sizes of codes that no encoder has; they decide how much memory a reader takes."""
    sides = meta["patch_nums"]
    if not isinstance(sides, list) or not all(type(side) is int and 1 <= side <= MAX_PATCH_NUM for side in sides):
        raise ValueError(f"patch_nums is {str(sides)[:80]}, expected a list of sides up to {MAX_PATCH_NUM}")
    limits = {"vocab_size": 2**16, "views": MAX_VIEWS, "bits": 16, "num_tokens": MAX_PATCH_NUM**2}
    for name, most in limits.items():
        if type(meta[name]) is not int or not 1 <= meta[name] <= most:
            raise ValueError(f"{name} is {str(meta[name])[:40]}, expected 1 to {most}")
    if meta["num_tokens"] != sum(side * side for side in sides):
        raise ValueError(f"num_tokens is {meta['num_tokens']}, patch_nums {sides} make another number")


def refuse_query(location: str) -> None:
    """Raise ValueError for a URL with a query: an index is kept and passed on, and a signature in it is neither."""
    if "?" in location:
        raise ValueError(f"{without_query(location)}: has a query; leave it out, logins go into ~/.netrc or ~/.aws")


def is_complete(folder: Path) -> bool:
    """True if `folder` was packed to the end."""
    return (Path(folder) / INDEX_NAME).is_file()


def refuse_complete(folder: Path) -> None:
    """Raise ValueError if `folder` already holds packed data."""
    if is_complete(folder):
        raise ValueError(f"{folder}: already packed; delete it or choose another output folder")


def shard_name(number: int) -> str:
    """The name of shard number `number` of a folder."""
    return f"shard-{number:06d}.tar"


def _refuse_missing(folder: Path) -> None:
    path = folder / INDEX_NAME
    next_step = "run launchers/pack_images.py, encode_codes.py or index_shards.py, or correct the path in the config"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {next_step}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, so this folder was never packed to the end; {next_step}")


def _version_refusal(content: Any) -> str:
    """Why an index of another version cannot be used, and what to do; empty: it is of this one. Raises KeyError."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    kind, version = content["kind"], content["version"]
    wanted = VERSIONS.get(kind) if isinstance(kind, str) else None
    if wanted is None or version == wanted:
        return ""
    return (
        f"version is {str(version)[:20]}, of {kind} this program reads version {wanted}; delete this folder and make it"
        " again with the command that made it, and finish runs that began on it with the program that began them"
    )


def _parse_index(content: dict[str, Any]) -> Index:
    return Index(content["kind"], tuple(ShardEntry(**shard) for shard in content["shards"]), content["meta"])
