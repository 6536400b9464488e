"""The bad samples of a run: counted over all ranks, listed in RUN/bad_samples.jsonl, refused above a limit.

The loader replaces a bad sample and says so; here every rank learns of what any rank has met. A fact is a plain mapping
about one sample: "shard" and "sample" say which it is, "substitute" which one was shown instead, "reason" why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.files.json_lines import append_lines, read_lines
from training.engine.distributed import World, failing_together, gather_objects

BAD_SAMPLES = "bad_samples.jsonl"

Fact = dict[str, Any]


class TooManyBadSamples(ValueError):
    """More samples are damaged than the run was told to bear."""

    exit_code: ClassVar[int] = 65


class BadSamples:
    """The distinct bad samples of a run, the same on all ranks after each `share`."""

    def __init__(self, run: Path, limit: int, world: World, take: Callable[[], list[Fact]]) -> None:
        """Read what earlier starts of the run have met: a collective.

        limit: distinct samples that are borne. take: returns this rank's facts since it was last called.
        """
        self.path = Path(run) / BAD_SAMPLES
        self.limit = limit
        self.world = world
        self.take = take
        known: list[Fact] = []
        with failing_together(world):
            if world.is_rank_zero:
                known = _read(self.path)
        self._known = {_name(fact) for fact in gather_objects(known, world)[0]}

    @property
    def count(self) -> int:
        """The number of distinct bad samples of the whole run so far."""
        return len(self._known)

    def share(self, report: Callable[[str], None]) -> dict[str, int]:
        """Let all ranks know what each has met; list and report what is new; return the metric "bad_samples".

        A collective. Raises an error on all ranks if the list cannot be written.
        """
        new: dict[tuple[str, int], Fact] = {}
        for facts in gather_objects(self.take(), self.world):
            new |= {_name(fact): fact for fact in facts if _name(fact) not in self._known}
        self._known |= set(new)
        with failing_together(self.world):
            if new and self.world.is_rank_zero:
                append_lines(self.path, list(new.values()))
        for fact in new.values():
            report(f"warning: a bad sample was replaced by sample {fact['substitute']}: {fact['reason']}")
        return {"bad_samples": self.count}

    def refuse_too_many(self) -> None:
        """Raise TooManyBadSamples, on all ranks, if there are more than the limit."""
        if self.count > self.limit:
            raise TooManyBadSamples(
                f"{self.count} bad samples, data.bad_samples allows {self.limit}; they are listed in {self.path}; "
                "allow more, or copy or pack these shards again and then remove that list"
            )


class NoBadSamples:
    """For runs in which a bad sample is an error where it is met: nothing to share, no metric, no collective."""

    def share(self, report: Callable[[str], None]) -> dict[str, int]:
        """Return no metric."""
        return {}

    def refuse_too_many(self) -> None:
        """Refuse nothing: there are none."""


def _name(fact: Fact) -> tuple[str, int]:
    return fact["shard"], fact["sample"]


def _read(path: Path) -> list[Fact]:
    """Read the facts in a list; a damaged line is none."""
    facts = [line.value for line in read_lines(path) if line.value]
    return [fact for fact in facts if isinstance(fact.get("shard"), str) and isinstance(fact.get("sample"), int)]
