"""The index of a packed folder, and where the folder's files lie.

A tar alone cannot tell damage from its own end, so the counts, sizes and sha256 of all shards stand in `index.json`. It
is written last: a folder with an index is complete. The folder is local or behind an http(s) or s3 URL; the index may
also name shards that lie elsewhere and belong to somebody else. What an index says is checked before anything is made
of it, since it may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.damage import DamagedData
from data_pipeline.files.strict_json import parse_json
from data_pipeline.files.urls import check_location, is_url, without_query
from data_pipeline.remote.cache import CacheConfig, ShardCache
from data_pipeline.shards.members import MEMBERS_SUFFIX, most_members

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
SHA256 = re.compile(r"[0-9a-f]{64}")
PACK_AGAIN = "copy or pack it again, or run launchers/index_shards.py on its shards"
MAKE_IT = "run launchers/pack_images.py, encode_codes.py or index_shards.py, or correct the path in the config"


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
        if not isinstance(self.location, str) or not self.location.isprintable():
            raise ValueError(f"{self.name}: location is {str(self.location)[:80]!r}, expected a path or URL")
        if is_url(self.location):
            check_location(self.location)
            refuse_query(self.location)
        elif self.location and (not self.location.startswith("/") or ".." in self.location.split("/")):
            shown = self.location[:80]
            raise ValueError(f"{self.name}: location is {shown!r}, expected an absolute path without '..', or a URL")

    @property
    def members_name(self) -> str:
        """The name of the file beside the index that holds the table of members."""
        return self.name.removesuffix(".tar") + MEMBERS_SUFFIX

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain JSON, without an empty location."""
        return {name: value for name, value in asdict(self).items() if name != "location" or value}


class Storage:
    """One packed folder, local or remote. Small files are read in place; a remote shard is read from its local copy."""

    def __init__(self, location: str | Path, cache: CacheConfig | None = None) -> None:
        """Refer to a folder or the URL of one. Raises ValueError for a URL that is not accepted."""
        self.location = str(location)
        check_location(self.location)
        self.cache = ShardCache(cache or CacheConfig())

    @classmethod
    def of(cls, location: str | Path | Storage) -> Storage:
        """Return a storage as it is, and make one with the default cache of a path or URL."""
        return location if isinstance(location, Storage) else cls(location)

    def __str__(self) -> str:
        return without_query(self.location)

    @property
    def is_remote(self) -> bool:
        """Tell whether the folder is behind a URL."""
        return is_url(self.location)

    def place_of(self, file: str | ShardEntry) -> str:
        """Name a file or shard of this folder in a message: its path or URL, without secrets."""
        return without_query(self._address(file))

    def read_small(self, name: str, *, max_bytes: int) -> bytes:
        """Read a file of this folder. Raises FileNotFoundError, and ValueError if it has more than `max_bytes`."""
        if self.is_remote:
            return self.cache.read_small(self._address(name), max_bytes=max_bytes)
        path = Path(self._address(name))
        size = regular_size(path)
        if size > max_bytes:
            raise ValueError(f"{path}: {size} bytes, at most {max_bytes} are accepted")
        return path.read_bytes()

    def is_remote_shard(self, shard: ShardEntry) -> bool:
        """Tell whether a shard is behind a URL, so that it is read from a copy in the cache."""
        return is_url(self._address(shard))

    def open(self, shard: ShardEntry) -> int:
        """Open a shard as a local file and return its descriptor. A remote shard is fetched and verified first."""
        location = self._address(shard)
        if is_url(location):
            return self.cache.open(location, size=shard.bytes, sha256=shard.sha256)
        regular_size(Path(location))  # opening a pipe would wait for a writer
        return os.open(location, os.O_RDONLY)

    def fetch_early(self, shard: ShardEntry) -> None:
        """Fetch a remote shard for later, unless another process is fetching it."""
        self.cache.fetch_unless_claimed(self._address(shard), size=shard.bytes, sha256=shard.sha256)

    def check_sizes(self, shards: tuple[ShardEntry, ...]) -> None:
        """Compare the size of every shard with the index.

        Raises FileNotFoundError for a missing shard, DamagedData for one of another size.
        """
        remote = [shard for shard in shards if self.is_remote_shard(shard)]
        sizes = dict(zip(remote, self.cache.sizes_of([self._address(shard) for shard in remote]), strict=True))
        for shard in shards:
            size = sizes[shard] if shard in sizes else regular_size(Path(self._address(shard)))
            if size != shard.bytes:
                what = f"{size} bytes, the index says {shard.bytes}; copy or pack it again"
                raise DamagedData(f"{self.place_of(shard)}: {what}")

    def _address(self, file: str | ShardEntry) -> str:
        if isinstance(file, ShardEntry):
            return file.location or self._address(file.name)
        if not self.is_remote:
            return str(Path(self.location) / file)
        address, question, query = self.location.partition("?")
        return f"{address.rstrip('/')}/{file}{question}{query}"


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
        """The number of samples in all shards together."""
        return sum(shard.samples for shard in self.shards)

    @property
    def record_parts(self) -> int:
        """The number of parts of a sample that have checksums of their own: the views of codes; 0 for images."""
        return self.meta["views"] if self.kind == "codes" else 0

    @property
    def fingerprint(self) -> str:
        """The sha256 of the index in canonical JSON, wherever its shards lie. Equal ones mean equal samples."""
        content = self._content()
        content["shards"] = [{**shard, "location": ""} for shard in content["shards"]]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def read(cls, location: str | Path | Storage, *, kind: Kind | None = None) -> Index:
        """Read the index of a packed folder, and insist on its kind if one is given.

        Raises FileNotFoundError without folder or index, DamagedData if the index is malformed or of another version,
        ValueError if it is of another kind.
        """
        storage = Storage.of(location)
        place = storage.place_of(INDEX_NAME)
        if not storage.is_remote and not Path(storage.location).is_dir():
            raise FileNotFoundError(f"{storage}: no such folder; {MAKE_IT}")
        if not storage.is_remote and not Path(place).exists():
            raise FileNotFoundError(f"{place}: no such file, so this folder was never packed to the end; {MAKE_IT}")
        index = cls.parse(storage.read_small(INDEX_NAME, max_bytes=MAX_INDEX_BYTES), place)
        if kind is not None and index.kind != kind:
            raise ValueError(f"{place}: holds {index.kind}, expected {kind}; correct the path in the config")
        return index

    @classmethod
    def parse(cls, content: bytes, place: str) -> Index:
        """Make an index of the bytes of its file, which errors call `place`.

        Raises DamagedData if it is malformed or of another version.
        """
        try:
            values = parse_json(content)
            refusal = _version_refusal(values)
            if not refusal:
                return cls(values["kind"], tuple(ShardEntry(**shard) for shard in values["shards"]), values["meta"])
        except KeyError as error:
            raise DamagedData(f"{place}: malformed index, {error} is missing; {PACK_AGAIN}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedData(f"{place}: malformed index, {error}; {PACK_AGAIN}") from error
        raise DamagedData(f"{place}: {refusal}")

    def to_bytes(self) -> bytes:
        """Return the content of the index's file."""
        return json.dumps(self._content(), indent=1).encode() + b"\n"

    def write(self, folder: Path) -> None:
        """Write `folder`/index.json in one step: a reader sees the whole index or none."""
        with atomic_file(Path(folder) / INDEX_NAME) as file:
            file.write(self.to_bytes())

    def _content(self) -> dict[str, Any]:
        shards = [shard.to_json() for shard in self.shards]
        return {"version": VERSIONS[self.kind], "kind": self.kind, "shards": shards, "meta": self.meta}


def _check_codes(meta: dict[str, Any]) -> None:
    """Raise ValueError for sizes of codes that no encoder has: they decide how much memory a reader takes."""
    sides = meta["patch_nums"]
    if not isinstance(sides, list) or not all(type(side) is int and 1 <= side <= MAX_PATCH_NUM for side in sides):
        raise ValueError(f"patch_nums is {str(sides)[:80]}, expected a list of sides up to {MAX_PATCH_NUM}")
    limits = {"vocab_size": 2**16, "views": MAX_VIEWS, "bits": 16, "num_tokens": MAX_PATCH_NUM**2}
    for name, most in limits.items():
        if type(meta[name]) is not int or not 1 <= meta[name] <= most:
            raise ValueError(f"{name} is {str(meta[name])[:40]}, expected 1 to {most}")
    if meta["num_tokens"] != sum(side * side for side in sides):
        raise ValueError(f"num_tokens is {meta['num_tokens']}, patch_nums {sides} make another number")


def _version_refusal(content: Any) -> str:
    """Say why an index of another version cannot be used and what to do; nothing for this version."""
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


def refuse_query(location: str) -> None:
    """Raise ValueError for a URL with a query: an index is kept and passed on, and a signature must not be."""
    if "?" in location:
        raise ValueError(f"{without_query(location)}: has a query; leave it out, logins go into ~/.netrc or ~/.aws")


def is_complete(folder: Path) -> bool:
    """Tell whether a folder was packed to the end."""
    return (Path(folder) / INDEX_NAME).is_file()


def refuse_complete(folder: Path) -> None:
    """Raise ValueError if a folder already holds packed data."""
    if is_complete(folder):
        raise ValueError(f"{folder}: already packed; delete it or choose another output folder")


def shard_name(number: int) -> str:
    """Return the name of shard number `number` of a folder."""
    return f"shard-{number:06d}.tar"


def regular_size(path: Path) -> int:
    """Return the bytes of a regular file. Raises FileNotFoundError, and ValueError for what is no file, as a pipe."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; copy or pack it again, or correct the path") from None
    except NotADirectoryError:
        raise FileNotFoundError(f"{path}: a part of this path is a file; correct the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: is no regular file; put the file itself there")
    return found.st_size
