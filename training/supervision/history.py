"""history.jsonl of a run folder: when the run was started, saved, stopped and rolled back, and by what.

metrics.jsonl holds what survives, as if nothing had ever gone wrong; this file holds what happened, and only grows.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.files.strict_json import parse_json
from training.seams import reach

CHECKPOINT, START, STOP, ROLL_BACK = "checkpoint", "start", "stop", "roll_back"
NEWLINE = "\n"
MAX_LINE_BYTES = 2**20


class History:
    """The events of one run folder, written by rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "history.jsonl"

    def note(self, event: str, **facts: Any) -> None:
        """Append an event with the time of day, and force it to disk. A disk that refuses costs one line, no more."""
        try:
            self._append(json.dumps({"event": event, "time": time.time()} | facts))
        except OSError as error:
            print(f"warning: {self.path}: {error.strerror}; the event '{event}' is not noted", flush=True)

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        reach("history.write")
        with self.path.open("a+b") as file:
            file.write(f"{'' if _ends_in_newline(file) else NEWLINE}{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of a kind, oldest first; a line that a crash has cut is left out."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            lines = iter(partial(file.readline, MAX_LINE_BYTES), b"")  # what is longer comes in pieces, none an event
            return [event for event in map(_parsed, lines) if event.get("event") == kind]

    def first_start(self) -> float | None:
        """When the run was first started, in seconds since the epoch; None before it was."""
        times = (event.get("time") for event in self.events(START))
        return next((time for time in times if isinstance(time, (int, float))), None)

    def saved_step(self) -> int | None:
        """The step of the newest checkpoint ever committed; None if there was none."""
        steps = (event.get("step") for event in reversed(self.events(CHECKPOINT)))
        return next((step for step in steps if isinstance(step, int)), None)


def _ends_in_newline(file: BinaryIO) -> bool:
    """Whether the last line is whole; an empty file has no other."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        event = parse_json(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
