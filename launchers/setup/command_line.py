"""From a command line to a frozen config, and from an exception to one clear line and an exit code.

A setting is written `a.b=c`, or, if it is at the top level of the command's config, `--name value`: a list takes its
values one after another (`--box 0 0 8 8`), a switch needs none, and hyphens are underscores. What comes later wins.
argparse has no options that may also be written as settings, so it reads the few options that are none.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from launchers.setup.config_files import (
    SETTING,
    build_config,
    describe_schema,
    nearest,
    parse_setting,
    read_layers,
    to_yaml,
)
from launchers.setup.exit_codes import EXIT_ERROR, EXIT_STOPPED, describe, exit_code, lost_its_peers, one_line
from training.engine.place import place_of
from training.engine.slurm import Place
from training.engine.unpickling import forbid_unpickling
from training.tracking.redaction import REMEDY, redact, redacted_output, secret_in

Config = TypeVar("Config")
RANK_ZERO_FIRST_SECONDS = 3.0  # most errors are the same on all ranks; then its launcher ends the others meanwhile
CAUSE_FIRST_SECONDS = 2.0  # for the rank that ended first to be noticed, so that its exit code is the launcher's
OPTIONS = ("--config", "--print-config", "--dry-run", "--world-size", "--help")
PLAIN_NAME = re.compile(r"[a-z][a-z_.-]{0,60}")
SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Command(Generic[Config]):
    """What the user asked for."""

    config: Config
    dry_run: bool
    world_size: int | None  # the world that a dry run is asked about


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ValueError, so that a wrong option is one line as any other error."""
        raise ValueError(f"{message}; options are shown by --help")


def run_launcher(schema: type[Config], launch: Callable[[Command[Config]], None], description: str | None) -> None:
    """Parse sys.argv, launch, and turn an error into one line and its exit code (launchers/setup/exit_codes.py).

    Errors of the program itself keep their traceback; NEXTSCALE_TRACEBACK=1 in the environment shows it for all.
    Passwords and tokens are hidden in whatever is printed, and no library may unpickle what it loads with torch.
    """
    forbid_unpickling()
    with redacted_output():
        code = _launched(schema, launch, description)
    if code:
        sys.exit(code)


def _launched(schema: type[Config], launch: Callable[[Command[Config]], None], description: str | None) -> int:
    try:
        command = parse(schema, sys.argv[1:], description)
        if command is not None and not (command.dry_run and _place().rank > 0):
            launch(command)
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        code = _report(error)
        if code == EXIT_ERROR and _place().world_size == 1:
            sys.excepthook = _print_redacted  # Python shows the traceback once nobody has caught it
            raise
    if _place().world_size > 1:
        end_process(code)
    return code


def end_process(code: int) -> NoReturn:
    """End this rank at once, its output written.

    An ordinary exit waits for the process group, whose other ranks may be gone. It also takes the interpreter down
    while gloo's threads may still want it, and now and then such a rank is aborted after its work is done and saved.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _report(error: BaseException) -> int:
    """Say why this process ends, after the rank that knows it best, and return the exit code."""
    rank, code = _place().rank, exit_code(error)
    if code == EXIT_STOPPED:
        if rank == 0:
            say(one_line(error))
        return code
    if lost_its_peers(error):
        time.sleep(CAUSE_FIRST_SECONDS)
    elif rank > 0:
        time.sleep(RANK_ZERO_FIRST_SECONDS)
    if os.environ.get("NEXTSCALE_TRACEBACK") == "1" or (code == EXIT_ERROR and _place().world_size > 1):
        traceback.print_exception(error)
    if code != EXIT_ERROR:
        print(f"error: {f'rank {rank}: ' if rank else ''}{describe(error)}", file=sys.stderr, flush=True)
    return code


def _place() -> Place:
    """Return the place of this process; a world of one if the environment says nothing sensible."""
    try:
        return place_of(os.environ)
    except ValueError:
        return Place(0, 1, 0, 1)


def refuse_several_ranks(launcher: str) -> None:
    """Raise ValueError if a launcher that writes one folder has been started more than once."""
    if place_of(os.environ).world_size > 1:
        raise ValueError(f"{launcher} runs on one process; start it with `python launchers/{launcher}`")


def parse(schema: type[Config], arguments: Sequence[str], description: str | None) -> Command[Config] | None:
    """Parse a command line; return None when it only asked for the config to be printed."""
    parser = _Parser(
        usage="%(prog)s [--config FILE] [options] [a.b=c | --name value ...]",
        description=description,
        epilog=f"settings, as a.b=c, as --name value if they have no dot, or as YAML:\n{describe_schema(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; `extends: OTHER.yaml` in it names its base")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and leave")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, without doing it")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of GPUs that --dry-run plans for")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    _refuse_secrets(arguments)
    known, rest = parser.parse_known_args(arguments)
    if known.world_size is not None and (known.world_size < 1 or not known.dry_run):
        raise ValueError(f"--world-size is {known.world_size}; it is a number of GPUs, 1 or more, for --dry-run")
    layers = read_layers(Path(known.config)) if known.config else []
    layers += settings_given(schema, rest)
    sources = ([known.config] if known.config else []) + (["command line"] if rest or not known.config else [])
    config = build_config(schema, layers, source=" or ".join(sources))
    if known.print_config:
        if _place().rank == 0:
            print(to_yaml(config), end="")
        return None
    return Command(config, dry_run=known.dry_run, world_size=known.world_size)


def _refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise ValueError for a password or token, before anything else is said of the arguments."""
    for before, argument in zip(["", *arguments], arguments):
        if what := secret_in(argument):
            name = (argument.partition("=")[0] if "=" in argument else before).removeprefix("--")
            setting = f"setting '{name}'" if PLAIN_NAME.fullmatch(name) else "the command line"
            raise ValueError(f"{setting} holds {what}, which records and MLflow would show; {REMEDY}")


def settings_given(schema: type, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Read the settings on a command line, one mapping each, in their order; ValueError for what is none."""
    layers, rest = [], list(arguments)
    bare = [field.name for field in fields(schema) if field.metadata.get("is_bare")]  # may be given without its name
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-"):
            name = _name_of_option(schema, argument)
            layers.append({name: _take_value(typing.get_type_hints(schema)[name], argument, rest)})
        elif bare and not SETTING.match(argument):
            layers.append({bare.pop(0): argument})
        else:
            layers.append(parse_setting(argument))
    return layers


def _name_of_option(schema: type, option: str) -> str:
    """Find the setting that `--name` means; ValueError shows how to write what is not written so."""
    name, equals, value = option.removeprefix("--").partition("=")
    name, kinds = name.replace("-", "_"), typing.get_type_hints(schema)
    if equals or "." in name:
        also = "" if "." in name else f" or --{name.replace('_', '-')} {value}"
        raise ValueError(f"'{option}' is not how a setting is written; write {name}={value or 'VALUE'}{also}")
    if name not in kinds or not option.startswith("--"):
        hint = nearest(option, [*(f"--{known.replace('_', '-')}" for known in kinds), *OPTIONS])
        raise ValueError(f"unknown option '{option}'; {hint}")
    if is_dataclass(kinds[name]):
        raise ValueError(f"{option} has settings of its own; write {name}.NAME=VALUE, their names are shown by --help")
    return name


def _take_value(kind: Any, option: str, rest: list[str]) -> str | list[str] | None:
    """Take from `rest` what belongs to an option: for a list all up to the next option or setting."""
    if kind is bool and not (rest and rest[0].lower() in SWITCH_VALUES):
        return "true"
    if not rest or rest[0].startswith("--"):
        raise ValueError(f"{option} is given no value; write {option} VALUE")
    if typing.get_origin(kind) is not tuple:
        value = rest.pop(0)
        return None if value == "null" and kind is not str else value
    values = []
    while rest and not rest[0].startswith("--") and not SETTING.match(rest[0]):
        values.append(rest.pop(0))
    return values


def say(text: str) -> None:
    """Print a progress line for people."""
    print(text, flush=True)


def say_nothing(text: str) -> None:
    """Drop a progress line, on the ranks that do not speak."""
