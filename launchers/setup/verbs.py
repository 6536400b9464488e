"""A command with several verbs: each has its settings class and its launch_VERB, in a module of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from launchers.setup.command_line import run_launcher
from launchers.setup.config_files import nearest
from launchers.setup.exit_codes import EXIT_BAD_INPUT


def run_verb(verbs: Mapping[str, str], description: str | None) -> None:
    """Run the verb that sys.argv names; only its module is imported.

    verbs: "package.module:SettingsClass" by the name of a verb.
    """
    name, given = Path(sys.argv[0]).name, sys.argv[1:2]
    if given in (["--help"], ["-h"]):
        print(description)
        return
    if not given or given[0] not in verbs:
        known = list(verbs)
        said = (
            f"'{given[0]}' is no verb; {nearest(given[0], known)}" if given else f"no verb; known: {', '.join(known)}"
        )
        print(f"error: {said}; write {name} VERB a=b ..., --help explains them", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    place, _, settings = verbs[given[0]].partition(":")
    module = import_module(place)
    del sys.argv[1]
    run_launcher(getattr(module, settings), getattr(module, f"launch_{given[0]}"), description)
