"""Errors for data that is not what its writer wrote, and the facts about a bad sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class DamagedData(ValueError):
    """A shard, a member, an image, a code record or an index that is damaged; the message names it and what to do.

    Whoever repeats the command gets the same error: the data must be mended first.
    """

    exit_code: ClassVar[int] = 65


class DamagedShard(DamagedData):
    """A shard of which nothing can be read, so that no other sample of it can stand in for one."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used: where it is, why not, and which sample was shown in its place."""

    shard: str
    sample: int  # number in the data set
    reason: str
    substitute: int
