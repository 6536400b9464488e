"""A scaling study: train several sizes, fit the paper's laws to them, report. `scaling_study.py VERB --config FILE`

verbs
  run     train every size, one after the other, and go on where it was; --slurm submits them as jobs instead
  fit     the laws, from what the runs have recorded: FOLDER/fit.json, points.csv
  report  FOLDER/report.md, its figures, and the study's page in MLflow
  plan    which size to train on how many tokens with a given compute: plan.pflop=N or plan.gpu_days=N
  paper   whether the laws that the paper prints fit together; takes no settings
  sync    rebuild the study's pages in MLflow from its folder

`scaling_study.py VERB FOLDER` takes the settings that `run` has left in the study's folder. Paths in them,
such as those of sizes and known_entropy, are relative to where the command is typed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launchers.setup.command_line import SETTING, Command, run_launcher
from launchers.setup.config_files import nearest
from launchers.setup.exit_codes import EXIT_BAD_INPUT
from launchers.study.config import STUDY, StudyConfig, as_setting


@dataclass(frozen=True)
class NoSettings:
    """`paper` is about the paper's own numbers."""


# the settings of each verb, and the module of launchers.study that has its launch_VERB
VERBS: MappingProxyType[str, tuple[type, str]] = MappingProxyType(
    {
        "run": (StudyConfig, "run"),
        "fit": (StudyConfig, "fitting"),
        "report": (StudyConfig, "report"),
        "plan": (StudyConfig, "plan"),
        "paper": (NoSettings, "plan"),
        "sync": (StudyConfig, "page"),
    }
)


def launch_of(verb: str) -> Callable[[Command[Any]], None]:
    """Return the function of a verb; its module, and torch, are imported only when it is called."""

    def launch(command: Command[Any]) -> None:
        getattr(import_module(f"launchers.study.{VERBS[verb][1]}"), f"launch_{verb}")(command)

    return launch


def take_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the verb and the arguments for its config, a study's folder among them replaced by its settings.

    Raises:
        ValueError: no verb, or none that is known; or the folder is not that of a study.
    """
    verb, *rest = arguments or [""]
    if verb not in VERBS:
        known = list(VERBS)
        said = f"'{verb}' is no verb; {nearest(verb, known)}" if verb else f"no verb given; known: {', '.join(known)}"
        raise ValueError(f"{said}; write scaling_study.py VERB --config FILE, --help explains them")
    if rest and not rest[0].startswith("-") and not SETTING.match(rest[0]):
        if VERBS[verb][0] is NoSettings:
            raise ValueError(f"{verb} takes no folder, got {rest[0]}; write scaling_study.py {verb}")
        settings = Path(rest[0]) / STUDY
        if not settings.is_file():
            raise ValueError(
                f"{rest[0]}: is not the folder of a study, which has a {STUDY} after its first `run`; name one, or "
                "--config FILE"
            )
        rest = ["--config", str(settings), as_setting("folder", rest[0]), *rest[1:]]
    return verb, rest


def main() -> None:
    """Run the verb that the command line names."""
    wants_help = sys.argv[1:2] in (["--help"], ["-h"])
    try:
        verb, rest = ("run", ["--help"]) if wants_help else take_verb(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.argv[1:] = rest
    run_launcher(VERBS[verb][0], launch_of(verb), __doc__)


if __name__ == "__main__":
    main()
