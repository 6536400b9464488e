"""Share the making of one folder's shards among any number of processes that start, die and join at any time.

No library that was found lets workers share work through nothing but a folder, survive kill -9 at any instruction, and
leave the bytes that one undisturbed worker would. While a folder is being filled it holds `.work/` with

- `plan.json`: everything that determines the bytes. It is written first; who has another plan is refused.
- `NAME.lock`: the kernel's lock on the shard NAME, held by the worker that makes it, whose name is inside.
- `NAME.json`: the entry of a finished shard, written after the shard. A shard counts as made when its entry fits it.

The last step writes the indexes out of the entries, and then `.work/` is removed. On a file system without locks two
workers may make the same shard. That is waste but no harm: both make the same bytes, and files appear by rename.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import bytes_sha256, read_sealed, seal_of, write_sealed
from data_pipeline.files.damage import DamagedData
from data_pipeline.files.locks import has_locks, release_lock, take_lock
from data_pipeline.shards.index import INDEX_NAME, ShardEntry, regular_size

WORK_NAME = ".work"
PLAN, ENTRY, MERGE = "plan", "entry", "merge"
POLL_SECONDS = 0.5  # between two looks at work that others hold
SAY_SECONDS = 10.0  # between two lines about waiting
NEWS_SECONDS = 60.0  # after which a network file system shows the files of another machine
Entry = dict[str, Any]


class Claims:
    """The shards of a folder, each of which is claimed, made and entered by one of the workers that share the folder.

    Every worker makes an object of its own with the same arguments, and calls `open` and then `finish`.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        plan: dict[str, Any],
        is_finished: Callable[[], bool],
        report: Callable[[str], None] = print,
    ) -> None:
        """Describe the work without touching the disk.

        names: such as "shard-000000" or "train/shard-000000". plan: plain JSON, everything that determines the bytes.
        is_finished: tells whether all indexes are there.
        """
        self.folder = folder
        self.names = tuple(names)
        self.plan = json.loads(json.dumps(plan))  # as it will be when it is read again
        self.is_finished = is_finished
        self.report = report
        self._work = folder / WORK_NAME
        self._plan_path = self._path(PLAN, "json")
        self._plan_sha256 = seal_of(self.plan)
        self._parents = sorted({(folder / name).parent for name in names})
        self._done, self._misfits = set[str](), set[str]()
        self._has_locks = True

    def open(self) -> None:
        """Lay down the plan, or join the work under way.

        Raises:
            ValueError: work with another plan is under way, or there are shards that nobody accounts for.
            DamagedData: the plan there is damaged.
        """
        self._refuse_strange_shards()
        while not self.is_finished():
            with self._unless_finished(), self._lock(PLAN) as lock:
                if lock is None or self.is_finished():
                    return
                self._has_locks = has_locks(lock)
                for parent in self._parents:
                    parent.mkdir(parents=True, exist_ok=True)
                if self._plan_path.exists():
                    self._refuse_another_plan()
                else:
                    write_sealed(self._plan_path, {PLAN: self.plan})
                return

    def work(self, make: Callable[[str], Entry]) -> None:
        """Make every shard that nobody else is making, and return when there is none left to claim.

        make: writes the shard of that name and returns its entry: plain JSON, with the ShardEntry, or None where
        nothing was left to put into a shard, as "shard".
        """
        while (claim := self._claim()) is not None:
            name, lock = claim
            try:
                self._remove_leftovers(name)
                entry = make(name)
                with self._unless_finished():
                    write_sealed(self._path(name, "json"), {PLAN: self._plan_sha256, ENTRY: entry})
            finally:
                release_lock(lock)

    def finish(self, make: Callable[[str], Entry], merge: Callable[[], None]) -> None:
        """Work, take over what others drop, and return when the folder is finished, by this worker or another.

        merge: makes the indexes out of the entries, as the last thing that it does. One worker calls it.
        """
        said = time.monotonic()
        while not self.is_finished():
            self.work(make)
            if len(self.done()) == len(self.names):
                self._merge(merge)
            elif not self.is_finished():
                time.sleep(POLL_SECONDS)
                if time.monotonic() - said > SAY_SECONDS:
                    self.report(f"{self.folder}: waiting for {self._in_work_elsewhere()}")
                    said = time.monotonic()
        forget_finished_work(self.folder)

    def done(self) -> set[str]:
        """Return the names of the shards that are made, whoever made them."""
        listed: set[str] = set()
        with suppress(FileNotFoundError):  # merged meanwhile
            listed = set(os.listdir(self._work))
        for name in self.names:
            if name not in self._done and self._path(name, "json").name in listed:
                self._is_done(name)
        return self._done

    def entry(self, name: str) -> Entry:
        """Read what `make` returned for a shard.

        Raises FileNotFoundError if it is not made; ValueError, KeyError or TypeError if the entry does not fit it.
        """
        content = read_sealed(self._path(name, "json"))
        if content[PLAN] != self._plan_sha256:
            raise ValueError("it belongs to another plan")
        entry: Entry = content[ENTRY]
        if shard := shard_of(entry):
            folder = (self.folder / name).parent
            table = (folder / shard.members_name).read_bytes()
            if regular_size(folder / shard.name) != shard.bytes or bytes_sha256(table) != shard.members_sha256:
                raise ValueError("it does not fit the shard")
        return entry

    def _claim(self) -> tuple[str, int] | None:
        """Find a shard that is not made and that nobody is making, and lock it; return its name and the lock."""
        done = self.done()
        for name in self._order():
            if name in done:
                continue
            with self._unless_finished():
                lock = take_lock(self._path(name, "lock"))
                if lock is None:
                    continue
                if self._plan_path.exists() and not self.is_finished() and not self._is_done(name):
                    os.pwrite(lock, f"{socket.gethostname()}, process {os.getpid()}\n".encode(), 0)
                    return name, lock
                release_lock(lock)
                if not self._plan_path.exists():
                    self._wait_until_finished()
        return None

    def _order(self) -> tuple[str, ...]:
        if self._has_locks:
            return self.names
        start = secrets.randbelow(len(self.names))  # blind workers meet less often when they begin apart
        return (*self.names[start:], *self.names[:start])

    def _merge(self, merge: Callable[[], None]) -> None:
        with self._unless_finished(), self._lock(MERGE) as lock:
            if lock is None or self.is_finished():
                return
            if self._has_locks:  # then nobody writes any more
                _remove(path for parent in (self.folder, *self._parents) for path in parent.glob(".*.tmp-*"))
            self._done = set()
            if len(self.done()) == len(self.names):  # each entry read once more
                merge()

    def _is_done(self, name: str) -> bool:
        """Tell whether a shard has an entry that fits it; with one that does not fit, the shard is made again."""
        try:
            self.entry(name)
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            if name not in self._misfits:
                self.report(f"{self._path(name, 'json')}: {error}; the shard is made again")
            self._misfits.add(name)
            return False
        self._done.add(name)
        return True

    def _refuse_another_plan(self) -> None:
        try:
            found = read_sealed(self._plan_path)[PLAN]
        except (ValueError, KeyError) as error:
            raise DamagedData(f"{self._plan_path}: damaged, {error}; delete {self.folder} and start anew") from error
        if change := first_difference(found, {**self.plan, **dict.fromkeys(found.keys() - self.plan.keys())}):
            raise ValueError(
                f"{self.folder}: work under way there has {change}; "
                f"go on with the same settings and source, or delete {self.folder} to start anew"
            )

    def _refuse_strange_shards(self) -> None:
        kinds = ("shard-*.tar", INDEX_NAME)
        strange = min((path for parent in self._parents for kind in kinds for path in parent.glob(kind)), default=None)
        # In this order: whoever makes shards has laid down a plan before, and removes it after it has finished.
        if strange is not None and not self._plan_path.exists() and not self.is_finished():
            raise ValueError(
                f"{strange}: is there already, but the folder was not packed to the end, and no work is under way; "
                f"delete {self.folder} or choose another folder"
            )

    @contextmanager
    def _lock(self, name: str) -> Iterator[int | None]:
        """Wait for a lock and hold it inside the block; give None if the folder is finished meanwhile."""
        path = self._path(name, "lock")
        while (lock := take_lock(path)) is None and not self.is_finished():
            time.sleep(POLL_SECONDS / 5)
        try:
            yield lock
        finally:
            if lock is not None:
                release_lock(lock)

    @contextmanager
    def _unless_finished(self) -> Iterator[None]:
        """Leave the block where a file is missing because others have finished and removed `.work`."""
        try:
            yield
        except FileNotFoundError:
            if self._plan_path.exists() and not self.is_finished():
                raise
            self._wait_until_finished()

    def _wait_until_finished(self) -> None:
        """Wait until the indexes are seen here: `.work` is gone, so another worker has written them."""
        gives_up = time.monotonic() + NEWS_SECONDS
        while not self.is_finished():
            if time.monotonic() > gives_up:
                raise ValueError(f"{self._work}: vanished while work was under way; was it deleted? start anew")
            time.sleep(POLL_SECONDS)

    def _remove_leftovers(self, name: str) -> None:
        """Remove what killed workers left of a shard; without locks, somebody else may be writing it."""
        if self._has_locks:
            shard = self.folder / name
            _remove(shard.parent.glob(f".{shard.name}.*.tmp-*"))
            _remove(self._work.glob(f".{self._path(name, 'json').name}.tmp-*"))

    def _in_work_elsewhere(self) -> str:
        missing = [name for name in self.names if name not in self._done]
        owners = [f"{name} ({self._owner(name)})" for name in missing[:3]]
        return f"shards in work elsewhere: {len(missing)}, the first: {', '.join(owners)}"

    def _owner(self, name: str) -> str:
        try:
            return self._path(name, "lock").read_text(errors="replace").split("\n")[0]
        except OSError:
            return "unknown"

    def _path(self, name: str, suffix: str) -> Path:
        return self._work / f"{name.replace('/', '-')}.{suffix}"


def shard_of(entry: Entry) -> ShardEntry | None:
    """Return the shard of an entry, or None if nothing was left to put into one. Raises ValueError, TypeError."""
    return None if entry["shard"] is None else ShardEntry(**entry["shard"])


def forget_finished_work(folder: Path) -> None:
    """Remove `.work` from a finished folder, where a worker that is killed after writing the index leaves it."""
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the first value of `wanted` that is another in `found`, as "NAME OLD, now it is NEW"; "" without one."""
    for name, now in wanted.items():
        if (was := found.get(name)) != now:
            return f"{name} {str(was)[:160]}, now it is {str(now)[:160]}"
    return ""


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
