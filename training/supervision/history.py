"""The file history.jsonl of a run folder: when the run was started, saved, stopped and rolled back.

metrics.jsonl holds the steps that count, without those that were rolled back; the history holds all that happened.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data_pipeline.files.json_lines import append_lines, read_lines

CHECKPOINT, START, STOP, ROLL_BACK, LOST_OUTPUT = "checkpoint", "start", "stop", "roll_back", "lost_output"


class History:
    """The events of one run folder, written by rank 0 only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "history.jsonl"

    def note(self, event: str, **facts: Any) -> None:
        """Append an event with the time of day and force it to disk; a disk that refuses costs one warning."""
        try:
            append_lines(self.path, [{"event": event, "time": time.time()} | facts])
        except OSError as error:
            print(f"warning: {self.path}: {error.strerror}; the event '{event}' is not noted", flush=True)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Read all events of a kind, oldest first; a damaged line is no event."""
        events = (line.value for line in read_lines(self.path) if line.value)
        return [event for event in events if event.get("event") == kind]

    def first_start(self) -> float | None:
        """Return when the run was first started, in seconds since the epoch; None before it was."""
        times = (event.get("time") for event in self.events(START))
        return next((time for time in times if isinstance(time, (int, float))), None)

    def saved_step(self) -> int | None:
        """Return the step of the newest checkpoint ever committed; None if there was none."""
        steps = (event.get("step") for event in reversed(self.events(CHECKPOINT)))
        return next((step for step in steps if isinstance(step, int)), None)
