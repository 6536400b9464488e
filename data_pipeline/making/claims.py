"""Work on the shards of one folder, shared by any number of processes that start, die and join whenever they like.

While the folder is being filled it holds `.work/`: the plan, which is all that determines the bytes; a lock file for
each shard; and an entry for each finished one, written after the shard itself, so that the entry is what commits it.
Locks are the kernel's (flock): they end with the process that held them, whatever ended it. Nobody talks to anybody.
On a file system without locks two workers may make the same shard, which is waste but no harm: both make the same
bytes, and files appear by rename.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import bytes_sha256, read_sealed, seal_of, write_sealed
from data_pipeline.files.damage import DamagedData
from data_pipeline.shards.index import INDEX_NAME, ShardEntry, regular_size

WORK_NAME = ".work"
PLAN, ENTRY, MERGE = "plan", "entry", "merge"
POLL_SECONDS = 0.5  # between two looks at work that others hold
SAY_SECONDS = 10.0  # between two lines about waiting
NEWS_SECONDS = 60.0  # after which another machine's files are seen through a network file system's cache
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
Entry = dict[str, Any]


class Claims:
    """The shards of `folder` by name, such as "shard-000000" or "train/shard-000000", and what is done of them."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        plan: dict[str, Any],
        is_finished: Callable[[], bool],
        report: Callable[[str], None] = print,
    ) -> None:
        """plan: plain JSON, everything that determines the bytes. is_finished: whether the indexes are there."""
        self.folder = folder
        self.names = tuple(names)
        self.plan = json.loads(json.dumps(plan))  # as it will be when it is read again
        self.is_finished = is_finished
        self.report = report
        self._work = folder / WORK_NAME
        self._plan_sha256 = seal_of(self.plan)
        self._parents = sorted({(folder / name).parent for name in names})
        self._done, self._spoilt = set[str](), set[str]()
        self._has_locks = True

    def open(self) -> None:
        """Lay down the plan, or join the work under way.

        Raises:
            ValueError: work with other settings is under way, or there are shards that nobody accounts for.
            DamagedData: the plan there is damaged.
        """
        self._refuse_strange_shards()
        while not self.is_finished():
            for folder in self._parents:
                folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # mkdir's exist_ok looks again, and others may have removed it by then
                os.mkdir(self._work)
            with self._unless_finished(), self._lock(PLAN) as is_held:
                if is_held and not self.is_finished():
                    if self._plan_path.exists():
                        self._refuse_another_plan()
                    else:
                        write_sealed(self._plan_path, {PLAN: self.plan})
                    return

    def work(self, make: Callable[[str], Entry]) -> None:
        """Make every shard that nobody works on; returns when there is none left to take.

        make: writes the shard of that name. Its entry is plain JSON with the ShardEntry, or None, as "shard".
        """
        while (claim := self._claim()) is not None:
            name, descriptor = claim
            try:
                self._remove_leftovers(name)
                entry = make(name)
                with self._unless_finished():
                    write_sealed(self._entry_path(name), {PLAN: self._plan_sha256, ENTRY: entry})
            finally:
                os.close(descriptor)  # and with it the lock

    def finish(self, make: Callable[[str], Entry], merge: Callable[[], None]) -> None:
        """Work, and take over what others drop, until all is done; then one worker merges, and the rest see it.

        merge: makes the indexes out of `entries`, as the last thing that it does.
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
        """The names of the shards that are done, whoever made them."""
        listed: set[str] = set()
        with suppress(FileNotFoundError):  # merged meanwhile
            listed = set(os.listdir(self._work))
        for name in self.names:
            if name not in self._done and self._entry_path(name).name in listed:
                self._is_done(name)
        return self._done

    def entry(self, name: str) -> Entry:
        """What was said of a shard that is done. Raises an error for one that is not, or whose entry does not fit."""
        content = read_sealed(self._entry_path(name))
        if content[PLAN] != self._plan_sha256:
            raise ValueError("it belongs to another plan")
        entry: Entry = content[ENTRY]
        if shard := shard_of(entry):
            folder = (self.folder / name).parent
            table = (folder / shard.members_name).read_bytes()
            if regular_size(folder / shard.name) != shard.bytes or bytes_sha256(table) != shard.members_sha256:
                raise ValueError("it does not fit the shard")
        return entry

    def entries(self) -> Iterator[Entry]:
        """What was said of every shard, in order. For `merge`."""
        return map(self.entry, self.names)

    def _claim(self) -> tuple[str, int] | None:
        """The next shard that nobody works on, and the lock on it."""
        self.done()
        for name in self._order():
            if name in self._done:
                continue
            descriptor = self._try_lock(name)
            if descriptor is None:
                continue
            if not self.is_finished() and not self._is_done(name):
                os.pwrite(descriptor, f"{socket.gethostname()}, process {os.getpid()}\n".encode(), 0)
                return name, descriptor
            os.close(descriptor)
        return None

    def _order(self) -> tuple[str, ...]:
        if self._has_locks:
            return self.names
        start = secrets.randbelow(len(self.names))  # blind workers meet less often when they begin apart
        return (*self.names[start:], *self.names[:start])

    def _merge(self, merge: Callable[[], None]) -> None:
        with self._unless_finished(), self._lock(MERGE) as is_held:
            if not is_held or self.is_finished():
                return
            if self._has_locks:  # then nobody writes any more
                _remove(path for parent in (self.folder, *self._parents) for path in parent.glob(".*.tmp-*"))
            self._done = set()
            if len(self.done()) == len(self.names):  # each looked at once more
                merge()

    def _is_done(self, name: str) -> bool:
        """Whether a shard has an entry that fits it. One that does not is as good as none: the shard is made again."""
        try:
            self.entry(name)
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            if name not in self._spoilt:
                self.report(f"{self._entry_path(name)}: {error}; the shard is made again")
            self._spoilt.add(name)
            return False
        self._done.add(name)
        return True

    def _refuse_another_plan(self) -> None:
        try:
            found = read_sealed(self._plan_path)[PLAN]
        except (ValueError, KeyError) as error:
            raise DamagedData(f"{self._plan_path}: damaged, {error}; delete {self.folder} and start anew") from error
        for name in {**self.plan, **found}:
            was, now = found.get(name), self.plan.get(name)
            if was != now:
                raise ValueError(
                    f"{self.folder}: work under way there has {name} {str(was)[:160]}, now it is {str(now)[:160]}; "
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

    def _try_lock(self, name: str) -> int | None:
        """An open file that holds the lock on that name; None if another process holds it, or all is finished."""
        try:
            descriptor = os.open(self._lock_path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            self._expect_finished()
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._has_locks = False
        return descriptor

    @contextmanager
    def _lock(self, name: str) -> Iterator[bool]:
        """Wait for the lock on that name; False if all is finished meanwhile."""
        while (descriptor := self._try_lock(name)) is None and not self.is_finished():
            time.sleep(POLL_SECONDS / 5)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                os.close(descriptor)

    @contextmanager
    def _unless_finished(self) -> Iterator[None]:
        """What is done in `.work`, which others remove as soon as they have finished: then there is nothing to do."""
        try:
            yield
        except FileNotFoundError:
            if self._work.exists() and not self.is_finished():
                raise
            self._expect_finished()

    def _expect_finished(self) -> None:
        """`.work` is gone: others have finished, though it may take a while until that is seen here."""
        gives_up = time.monotonic() + NEWS_SECONDS
        while not self.is_finished():
            if time.monotonic() > gives_up:
                raise ValueError(f"{self._work}: vanished while work was under way; was it deleted? start anew")
            time.sleep(POLL_SECONDS)

    def _remove_leftovers(self, name: str) -> None:
        """Remove what killed workers left of a shard: nobody else works on it, if locks can be trusted."""
        if self._has_locks:
            shard = self.folder / name
            _remove(shard.parent.glob(f".{shard.name}.*.tmp-*"))
            _remove(self._work.glob(f".{self._entry_path(name).name}.tmp-*"))

    def _in_work_elsewhere(self) -> str:
        missing = [name for name in self.names if name not in self._done]
        owners = [f"{name} ({self._owner(name)})" for name in missing[:3]]
        return f"shards in work elsewhere: {len(missing)}, the first: {', '.join(owners)}"

    def _owner(self, name: str) -> str:
        try:
            return self._lock_path(name).read_text(errors="replace").split("\n")[0]
        except OSError:
            return "unknown"

    @property
    def _plan_path(self) -> Path:
        return self._work / f"{PLAN}.json"

    def _entry_path(self, name: str) -> Path:
        return self._work / f"{name.replace('/', '-')}.json"

    def _lock_path(self, name: str) -> Path:
        return self._work / f"{name.replace('/', '-')}.lock"


def shard_of(entry: Entry) -> ShardEntry | None:
    """The shard that an entry speaks of; None if nothing was left to put in one. Raises ValueError, TypeError."""
    return None if entry["shard"] is None else ShardEntry(**entry["shard"])


def forget_finished_work(folder: Path) -> None:
    """Remove `.work` from a folder that is finished: what a worker leaves that is killed after writing the index."""
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
