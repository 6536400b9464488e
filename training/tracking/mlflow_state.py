"""mlflow.json of a run folder: where in MLflow the run is shown. It can get lost: trackers are asked what they have."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.locks import take_lock
from data_pipeline.files.strict_json import read_json

STATE, LOCK = "mlflow.json", "mlflow.lock"
OF_A_TRACKER = ("run_id", "experiment_id", "replaces", "train", "validation")  # values that mean nothing to another
KINDS = {"train": int, "validation": int}  # of values that are no text


class ViewState:
    """The tracker's `uri`, `run_id`, `experiment_id`, and the `status` that the run ended with, or RUNNING.

    `git` is the commit of the code that has trained the run last, where it is known. Earlier formats also hold the
    newest steps that were sent, as `train` and `validation`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writing = threading.Lock()  # an uploader notes the status while it sends
        self._claim: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        """What the file holds now: the process of a run that was killed may have written it a moment ago."""
        return read_state(self.folder) or {}

    def update(self, **changes: Any) -> None:
        """Change values, None taking one away. The file is replaced whole, and only if that makes a difference."""
        with self._writing:
            known = self.values
            changed = {name: value for name, value in (known | changes).items() if value is not None}
            if changed != known:
                with atomic_file(self.folder / STATE) as file:
                    file.write(json.dumps(changed).encode())

    def is_of(self, uri: str) -> bool:
        """Whether the file speaks of this tracker."""
        return self.values.get("uri") == uri

    def note(self, uri: str, experiment: str, **changes: Any) -> None:
        """Note which tracker this is, and more; what the file says of another tracker goes."""
        if not self.is_of(uri):
            changes = dict.fromkeys(OF_A_TRACKER) | changes
        self.update(**{"uri": uri, "experiment": experiment} | changes)

    def claim(self) -> None:
        """Keep other processes from sending this run, until `release` or the end of this one.

        A file system without locks is used without: the tracker's database still keeps equal points once.

        Raises:
            BlockingIOError: another process is sending it.
        """
        if self._claim is not None:
            return
        claim = take_lock(self.folder / LOCK)
        if claim is None:
            raise BlockingIOError(f"{self.folder} is being sent by another process, as a run does")
        self._claim = claim

    def release(self) -> None:
        """Let other processes send this run."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None


def read_state(folder: Path) -> dict[str, Any] | None:
    """What mlflow.json of a run folder holds; None where there is none, or none that can be read."""
    try:
        state = read_json(folder / STATE)
    except (OSError, ValueError):
        return None
    if not isinstance(state, dict):
        return None
    return {name: value for name, value in state.items() if type(value) is KINDS.get(name, str)}
