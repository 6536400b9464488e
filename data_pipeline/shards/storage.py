"""Where packed data lies: a local folder, or a folder behind an http(s) or s3 URL whose shards are cached here.

Small files (the index, member tables) are read from the storage itself; a shard is a local file by the time it is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.files.damage import DamagedData
from data_pipeline.remote.remote import CacheConfig, ShardCache, check_location, is_url, without_query

if TYPE_CHECKING:
    from data_pipeline.shards.index import ShardEntry


class Storage:
    """One packed folder."""

    def __init__(self, location: str | Path, cache: CacheConfig | None = None) -> None:
        """location: a folder, or the URL of one. Raises ValueError for a URL that is not accepted."""
        self.location = str(location)
        check_location(self.location)
        self.cache = ShardCache(cache or CacheConfig())

    def __str__(self) -> str:
        return without_query(self.location)

    @property
    def is_remote(self) -> bool:
        return is_url(self.location)

    def place_of(self, name: str) -> str:
        """Where a file of this folder is, for messages."""
        return without_query(self._join(name))

    def place_of_shard(self, shard: ShardEntry) -> str:
        """Where a shard is, for messages."""
        return without_query(self._shard(shard))

    def read_small(self, name: str, *, max_bytes: int) -> bytes:
        """A file of this folder. Raises FileNotFoundError, and ValueError if it is larger than that."""
        if self.is_remote:
            return self.cache.read_small(self._join(name), max_bytes=max_bytes)
        path = Path(self._join(name))
        size = regular_size(path)
        if size > max_bytes:
            raise ValueError(f"{path}: {size} bytes, at most {max_bytes} are accepted")
        return path.read_bytes()

    def is_remote_shard(self, shard: ShardEntry) -> bool:
        return is_url(self._shard(shard))

    def open(self, shard: ShardEntry) -> int:
        """A descriptor of a local file with the content of a shard; of a remote one, fetched and verified."""
        location = self._shard(shard)
        if is_url(location):
            return self.cache.open(location, size=shard.bytes, sha256=shard.sha256)
        regular_size(Path(location))  # opening a pipe would wait for a writer
        return os.open(location, os.O_RDONLY)

    def fetch_early(self, shard: ShardEntry) -> None:
        """Fetch a remote shard for later, unless another process is fetching it."""
        self.cache.fetch_unless_claimed(self._shard(shard), size=shard.bytes, sha256=shard.sha256)

    def check_sizes(self, shards: tuple[ShardEntry, ...]) -> None:
        """Compare the size of every shard with the index.

        Raises FileNotFoundError for a missing shard, DamagedData for one of another size.
        """
        remote = [shard for shard in shards if self.is_remote_shard(shard)]
        found = self.cache.sizes_of([self._shard(shard) for shard in remote])
        sizes = dict(zip((shard.name for shard in remote), found, strict=True))
        for shard in shards:
            size = sizes[shard.name] if shard.name in sizes else regular_size(Path(self._shard(shard)))
            if size != shard.bytes:
                place = self.place_of_shard(shard)
                raise DamagedData(f"{place}: {size} bytes, the index says {shard.bytes}; copy or pack it again")

    def _shard(self, shard: ShardEntry) -> str:
        return shard.location or self._join(shard.name)

    def _join(self, name: str) -> str:
        if not self.is_remote:
            return str(Path(self.location) / name)
        address, question, query = self.location.partition("?")
        return f"{address.rstrip('/')}/{name}{question}{query}"


def regular_size(path: Path) -> int:
    """Bytes of a regular file. Raises FileNotFoundError, and ValueError for what is no file, such as a pipe."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; copy or pack it again, or correct the path") from None
    except NotADirectoryError:
        raise FileNotFoundError(f"{path}: a part of this path is a file; correct the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: is no regular file; put the file itself there")
    return found.st_size
