"""From YAML files and settings on the command line to a frozen config, and back.

Later layers win: the defaults in the dataclasses, the file that `extends:` names, the file itself, then the command
line. OmegaConf merges the layers and converts each text to the type of its field. The loader here adds what PyYAML and
OmegaConf lack: a text such as 12:30, 010 or yes stays what it is, and a key given twice, a tag, an anchor, a reference
`${...}` to the environment, a password and a number that is not finite are refused.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.files.nested import flatten
from data_pipeline.files.strict_json import read_regular_file
from launchers.setup.exit_codes import one_line
from training.tracking.redaction import REMEDY, redact, secret_in

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

Config = TypeVar("Config")
MAX_BYTES = 2**15  # of a config file; ten times what a resolved config has
MAX_SHOWN = 80  # characters of a wrong value
HOME = re.compile(r"~(\w[\w.-]*)?(/|$)")  # as a path begins
LIKE_NUMBER = re.compile(r"[-+.]?\d")  # as text begins that some reader takes for a number
SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+){0,9}=")


class _PlainYaml:
    """A part of both loaders that refuses what is dangerous or surprising: tags, anchors, aliases, repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[attr-defined]
        if event.anchor is not None:
            raise yaml.MarkedYAMLError(None, None, "an anchor or alias; write the value itself", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(None, None, f"a tag ({event.tag[:80]}); write the value only", event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key that is no text", key.start_mark)
            if key.value in mapping:
                raise yaml.MarkedYAMLError(None, None, f"'{key.value[:80]}' is given twice", key.start_mark)
            mapping[key.value] = self.construct_object(value, deep=True)  # type: ignore[attr-defined]
        return mapping


class _TextLoader(_PlainYaml, yaml.BaseLoader):
    """Every value is text or null; the field it is for says what type it has."""

    def construct_scalar(self, node: Any) -> Any:
        return None if node.style is None and node.value.lower() in ("", "~", "null") else node.value


class _TypedLoader(_PlainYaml, yaml.SafeLoader):
    """Values have the types that YAML gives them, as in what `to_yaml` writes."""


def parse_yaml(content: str | bytes, source: str, loader: type = _TextLoader) -> Any:
    """Read the values of a YAML text: mappings, lists, text and null.

    Raises:
        ValueError: not YAML, or more than plain values; names `source`, line and column.
    """
    try:
        return loader(content).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{source}: {place}not plain YAML: {said}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not plain YAML: {one_line(error)}; save it as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply") from None


def _read_file(path: Path, loader: type = _TextLoader) -> dict[str, Any]:
    """Read the mapping in a config file; FileNotFoundError or ValueError names the file."""
    try:
        content = read_regular_file(path, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such config file; the ones that come with the project are in configs/"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; a config is a small text file") from None
    settings = parse_yaml(content, str(path), loader)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds no settings; a config is a mapping, `name: value` in each line")
    return settings


def read_layers(path: Path, below: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """Read a config file and what it extends, the base first; FileNotFoundError or ValueError names the file."""
    place = Path(os.path.realpath(path))
    if place in below:
        raise ValueError(f"{path}: extends itself through {' -> '.join(p.name for p in below)}; break the circle")
    layer = _read_file(path)
    base = layer.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends is {_shortened(repr(base))}; it must be the name of one file")
    return ([] if base is None else read_layers(path.parent / base, (*below, place))) + [layer]


def parse_setting(text: str) -> dict[str, Any]:
    """Read `a.b=c`, where c is YAML, into a nested mapping; ValueError if it is none."""
    name, _, value = text.partition("=")
    if not SETTING.match(text):
        raise ValueError(f"'{_shortened(text)}' is not a setting; write it as a.b=c")
    return _nest(name, parse_yaml(value, f"{name}="))


def _nest(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def load_config(schema: type[Config], file: str | None, settings: Sequence[str] = ()) -> Config:
    """Build a config of class `schema` from a YAML file and settings written `a.b=c`.

    Raises:
        FileNotFoundError: the file or one that it extends does not exist.
        ValueError: unknown key, wrong type, missing setting, or a value that a dataclass refuses.
    """
    layers = read_layers(Path(file)) if file else []
    return build_config(schema, [*layers, *map(parse_setting, settings)], source=file or "command line")


def build_config(schema: type[Config], layers: Sequence[Mapping[str, Any]], *, source: str) -> Config:
    """Build a frozen dataclass from nested mappings, the later ones winning; ValueErrors name `source`."""
    layers = [_with_home(layer) for layer in layers]
    for layer in layers:
        _refuse_unfit(layer)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *layers)
    except ConfigKeyError as error:
        section, _, name = str(error.full_key).rpartition(".")
        known = typing.get_type_hints(setting_type(schema, section) if section else schema)
        hint = nearest(name, list(known), f"{section}." if section else "")
        raise ValueError(f"{source}: unknown key '{error.full_key}'; {hint}") from None
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{source}: {_wrong_value(schema, layers) or one_line(error)}; see --help") from None
    _refuse_unfit(OmegaConf.to_container(merged))
    try:
        return typing.cast(Config, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        missing = error.full_key
        raise ValueError(f"setting '{missing}' is missing; give it in the config or as {missing}=...") from None


def _with_home(value: Any) -> Any:
    """Replace a `~` that begins a path in any setting, as a shell does where it sees one."""
    if isinstance(value, Mapping):
        return {name: _with_home(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and HOME.match(value) else value


def _refuse_unfit(settings: Any) -> None:
    """Raise ValueError for what no setting may be, whatever its type allows."""
    for name, value in flatten(settings).items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"setting '{name}' is {item}; it must be a finite number")
            if isinstance(item, (list, dict)) and isinstance(value, list):
                raise ValueError(f"setting '{name}' is {_shortened(repr(value))}; it holds a list in a list")
            if "${" in str(item):
                raise ValueError(f"setting '{name}' has a reference ${{...}}, which is not resolved; write the value")
            if what := secret_in(str(item)):
                raise ValueError(f"setting '{name}' holds {what}, which records and MLflow would show; {REMEDY}")


def _wrong_value(schema: type, layers: Sequence[Mapping[str, Any]]) -> str | None:
    """Name the first setting whose value cannot be converted, which OmegaConf does not do for an item of a list."""
    for name, value in (item for layer in layers for item in flatten(layer).items()):
        try:
            OmegaConf.merge(OmegaConf.structured(schema), _nest(name, value))
        except (OmegaConfBaseException, TypeError):
            shown = "null" if value is None else _shortened(repr(value))
            while setting_type(schema, name) is None:  # a mapping in the place of a value
                name, shown = name.rpartition(".")[0], "a mapping"
            return f"'{name}' is {shown}, expected {_type_name(setting_type(schema, name))}"
    return None


def _shortened(text: str) -> str:
    text = redact(text[:2000])  # before it is cut: half a secret is not recognised
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def setting_type(schema: type, name: str) -> Any:
    """Look up the type of the setting with a dotted name; None if there is no such setting."""
    kind: Any = schema
    for part in name.split("."):
        kind = typing.get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Ask whether the most similar of the known names was meant, or list them all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{prefix}{close[0]}'?" if close else f"known here: {', '.join(known)}"


def _type_name(kind: Any) -> str:
    """Say a type in words: "int", "several float", "int or null"."""
    members = typing.get_args(kind)
    if is_dataclass(kind):
        return "a mapping of settings"
    if typing.get_origin(kind) is tuple:
        return f"several {_type_name(members[0])}"
    if members:
        return " or ".join("null" if member is type(None) else _type_name(member) for member in members)
    return {"str": "text", "bool": "true or false"}.get(kind.__name__, kind.__name__)


def describe_schema(schema: type, prefix: str = "  ") -> str:
    """List the settings for --help, one a line: dotted name, type, default, and the comment it has in the source."""
    kinds, comments, lines = typing.get_type_hints(schema), _comments(schema), []
    for item in fields(schema):
        kind = kinds[item.name]
        if is_dataclass(kind):
            lines.append(describe_schema(typing.cast(type, kind), f"{prefix}{item.name}."))
            continue
        default = item.default if item.default is not MISSING else "required"
        shown = "empty" if default in ("", ()) else default
        lines.append(f"{prefix}{item.name}  ({_type_name(kind)}) {shown}{comments.get(item.name, '')}")
    return "\n".join(lines)


def _comments(schema: type) -> dict[str, str]:
    """Find what the source says of each setting of a dataclass, behind a #."""
    comments: dict[str, str] = {}
    for parent in filter(is_dataclass, reversed(schema.__mro__)):
        found = (re.match(r"    (\w+): [^#]*(#.*)$", line) for line in inspect.getsource(parent).splitlines())
        comments |= {match[1]: f"  {match[2]}" for match in found if match}
    return comments


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml, whatever version wrote it: values by dotted names; none if it is not there.

    Raises:
        ValueError: not YAML, or not a mapping.
    """
    flat = flatten(_read_file(path, _TypedLoader)) if path.is_file() else {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}


def to_yaml(config: Any) -> str:
    """Write a config as YAML that `--config` and `read_settings` read back."""
    return yaml.dump(_plain(asdict(config)), Dumper=_TextDumper, sort_keys=False, default_flow_style=None)


class _TextDumper(yaml.SafeDumper):
    """Quotes text that some reader of YAML takes for a number, such as 1e5."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if LIKE_NUMBER.match(text) else None)


_TextDumper.add_representer(str, _represent_text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
