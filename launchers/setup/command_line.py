"""From a command line to a frozen config, and from an exception to one clear line.

Every setting of a launcher's config can be written `a.b=c`, `--a.b=c` or `--a.b c`, and what comes later wins. With
dashes a list takes its values one after another (`--box 0 0 8 8`), a switch needs none, and hyphens are underscores.
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
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from launchers.setup.config_files import describe_schema, load_config, nearest, one_line, setting_type, to_yaml
from launchers.setup.exit_codes import EXIT_ERROR, describe, exit_code, lost_its_peers
from training.engine.distributed import World, end_process
from training.engine.unpickling import forbid_unpickling
from training.supervision.stopping import Stopped
from training.tracking.redaction import REMEDY, redact, redacted_output, secret_in

Config = TypeVar("Config")
RANK_ZERO_FIRST_SECONDS = 3.0  # most errors are the same on all ranks; then its launcher ends the others meanwhile
CAUSE_FIRST_SECONDS = 2.0  # for the rank that ended first to be noticed, so that its exit code is the launcher's
OPTIONS = ("config", "print-config", "dry-run", "world-size", "local_rank", "help")  # all that are no settings
TAKE_A_VALUE = (["--config"], ["--world-size"], ["--local_rank"])
PLAIN_NAME = re.compile(r"[a-z][a-z_.-]{0,60}")
SETTING = re.compile(r"[A-Za-z_][\w.]*=")
SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class Command(Generic[Config]):
    """What the user asked for."""

    config: Config
    dry_run: bool
    world_size: int | None  # the world that a dry run is asked about


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; options are shown by --help")


def run_launcher(schema: type[Config], launch: Callable[[Command[Config]], None], description: str) -> None:
    """Parse sys.argv, launch, and turn what can go wrong into one line and the exit code of `launchers.setup.exit_codes`.

    Errors of the program itself keep their traceback; NEXTSCALE_TRACEBACK=1 in the environment shows it for all.
    Passwords and tokens are hidden in whatever is printed, and no library may unpickle what it loads with torch.
    """
    forbid_unpickling()
    with redacted_output():
        code = _launched(schema, launch, description)
    if code:
        sys.exit(code)


def _launched(schema: type[Config], launch: Callable[[Command[Config]], None], description: str) -> int:
    try:
        command = parse(schema, sys.argv[1:], description)
        only_says = command is None or command.dry_run
        if command is not None and not (only_says and _place()[0] > 0):
            launch(command)
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        code = _report(error)
        if code == EXIT_ERROR and _place()[1] == 1:
            sys.excepthook = _print_redacted  # Python shows the traceback once nobody has caught it
            raise
    if _place()[1] > 1:
        end_process(code)  # at once: its peers may be gone, and the process group would wait for them
    return code


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _report(error: BaseException) -> int:
    """Say on the right stream, and after the rank that knows it best, why this process ends; its exit code."""
    rank, _ = _place()
    code = exit_code(error)
    if isinstance(error, Stopped):
        if rank == 0:
            say(one_line(error))
        return code
    if lost_its_peers(error):
        time.sleep(CAUSE_FIRST_SECONDS)
    elif rank > 0:
        time.sleep(RANK_ZERO_FIRST_SECONDS)
    if os.environ.get("NEXTSCALE_TRACEBACK") == "1" or (code == EXIT_ERROR and _place()[1] > 1):
        traceback.print_exception(error)
    if code != EXIT_ERROR:
        print(f"error: {f'rank {rank}: ' if rank else ''}{describe(error)}", file=sys.stderr, flush=True)
    return code


def _place() -> tuple[int, int]:
    """The rank of this process and the number of ranks; a world of one if the environment says nothing sensible."""
    try:
        world = World.from_environment()
    except ValueError:
        return 0, 1
    return world.rank, world.world_size


def parse(schema: type[Config], arguments: Sequence[str], description: str) -> Command[Config] | None:
    """Parse a command line; None when it only asked for the config to be printed."""
    parser = _Parser(
        description=description,
        epilog=f"settings, as a.b=c or --a.b c here, or as YAML:\n{describe_schema(schema)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; `extends: OTHER.yaml` in it names its base")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and leave")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, without doing it")
    parser.add_argument("--world-size", type=int, metavar="N", help="number of GPUs that --dry-run plans for")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win over the file")
    _refuse_secrets(arguments)
    known = parser.parse_intermixed_args(settings_as_overrides(schema, arguments))
    if known.world_size is not None and (known.world_size < 1 or not known.dry_run):
        raise ValueError(f"--world-size is {known.world_size}; it is a number of GPUs, 1 or more, for --dry-run")
    config = load_config(schema, known.config, known.overrides)
    if known.print_config:
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


def settings_as_overrides(schema: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with every setting written as a.b=c, in their order; ValueError for an option that is none."""
    rewritten, rest = [], list(arguments)
    bare = [field.name for field in fields(schema) if field.metadata.get("is_bare")]  # may be given without its name
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        if not key or not option.startswith("--") or option.removeprefix("--") in OPTIONS:
            is_value = argument.startswith("-") or SETTING.match(argument) or rewritten[-1:] in TAKE_A_VALUE
            rewritten.append(f"{bare.pop(0)}={_as_yaml(str, argument)}" if bare and not is_value else argument)
        else:
            rewritten.append(f"{key}={value if equals else _take_value(schema, key, option, rest)}")
    return rewritten


def _take_value(schema: type, key: str, option: str, rest: list[str]) -> str:
    """Take from `rest` what belongs to an option, as YAML."""
    kind = setting_type(schema, key)
    if kind is None:
        names = [f"--{name.replace('_', '-')}" for name in typing.get_type_hints(schema)]
        hint = nearest(option, [*names, *(f"--{name}" for name in OPTIONS)])
        raise ValueError(f"unknown option '{option}'; {hint}")
    if is_dataclass(kind):
        raise ValueError(f"{option} has settings of its own; write {key}.NAME=VALUE, their names are shown by --help")
    members = typing.get_args(kind) or (kind,)  # of a union such as int | None
    item = next((typing.get_args(member)[0] for member in (kind, *members) if typing.get_origin(member) is tuple), None)
    if item is not None:
        return _take_list(item, option, rest)
    if bool in members and not (rest and rest[0].lower() in SWITCH_VALUES):
        return "true"
    _refuse_no_value(option, rest)
    return _as_yaml(kind, rest.pop(0))


def _take_list(kind: Any, option: str, rest: list[str]) -> str:
    """The values up to the next option or setting, as a YAML list; one that is such a list already stays as it is."""
    _refuse_no_value(option, rest)
    values = []
    while rest and not rest[0].startswith("--") and not SETTING.match(rest[0]):
        values.append(rest.pop(0))
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    return f"[{','.join(_as_yaml(kind, value) for value in values)}]"


def _refuse_no_value(option: str, rest: list[str]) -> None:
    if not rest or rest[0].startswith("--"):
        raise ValueError(f"{option} is given no value; write {option} VALUE")


def _as_yaml(kind: Any, value: str) -> str:
    """Text is quoted, so that a path such as 007 or a,b stays what it is."""
    quoted = value.replace("'", "''")
    return f"'{quoted}'" if kind is str else value


def say(text: str) -> None:
    """A progress line for people."""
    print(text, flush=True)


def say_nothing(text: str) -> None:
    """Progress on the ranks that do not speak."""
