"""From YAML files and overrides to a frozen config, and back.

Precedence: the defaults in the dataclasses, then the file on top of the files it `extends:`, then the `a.b=c`
overrides. OmegaConf merges; unknown keys and wrong types are errors that name the nearest known key. A setting that
holds a password or a token is refused: settings go into checkpoints, records and MLflow.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.files.nested import flatten
from launchers.setup.yaml_files import MAX_DEPTH, parse_yaml, read_yaml
from training.tracking.redaction import REMEDY, redact, secret_in

Config = TypeVar("Config")
MAX_EXTENDED = 16  # files, one on top of the other
MAX_SHOWN = 80  # characters of a wrong value


def load_config(schema: type[Config], file: str | None, overrides: Sequence[str] = ()) -> Config:
    """Build a config of class `schema` from a YAML file and overrides.

    Raises:
        FileNotFoundError: the file or one that it extends does not exist.
        ValueError: unknown key, wrong type, missing setting, or a value that a dataclass refuses.
    """
    layers = _read_layers(Path(file)) if file else []
    layers += [_override(text) for text in overrides]
    return build_config(schema, layers, source=file or "command line")


def _override(text: str) -> dict[str, Any]:
    """The setting that `a.b=c` gives, nested as in a file; c is YAML."""
    name, equals, value = text.partition("=")
    parts = name.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ValueError(f"'{_shortened(text)}' is not a setting; write it as a.b=c")
    layer = parse_yaml(value, f"{_shortened(name)}=")
    for part in reversed(parts):
        layer = {part: layer}
    return layer


def _shortened(text: str) -> str:
    text = redact(text[:2000])  # before it is cut: the half of a secret has no form
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def build_config(schema: type[Config], layers: Sequence[dict[str, Any]], *, source: str) -> Config:
    """A frozen dataclass from plain mappings, the later ones winning; `source` names them in errors (ValueError)."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for layer in layers:
        _refuse_unknown_keys(schema, layer, source)
    try:
        return _build(schema, OmegaConf.merge(OmegaConf.structured(schema), *layers))
    except OmegaConfBaseException as error:
        wrong = _wrong_value(schema, layers) or f"{one_line(error)}; see --help"
        raise ValueError(f"{source}: {wrong}") from None


def _refuse_unfit(name: str, value: Any) -> None:
    """Raise ValueError for what no setting may be, whatever its type allows."""
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"setting '{name}' is {item}; it must be a finite number")
        if isinstance(item, str) and (what := secret_in(item)):
            raise ValueError(f"setting '{name}' holds {what}, which records and MLflow would show; {REMEDY}")


def _wrong_value(schema: type, layers: Sequence[dict[str, Any]]) -> str | None:
    """Name the first setting whose value cannot be converted, and what is expected; OmegaConf does not always say."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, value in [item for layer in layers for item in flatten(layer).items()]:
        alone: Any = value
        for part in reversed(key.split(".")):
            alone = {part: alone}
        try:
            OmegaConf.merge(OmegaConf.structured(schema), alone)
        except OmegaConfBaseException:
            return f"'{key}' is {_shortened(repr(value))}, expected {_type_name(setting_type(schema, key))}; see --help"
    return None


def setting_type(schema: type, key: str) -> Any:
    """The type of the setting with a dotted name, or None where there is no such setting."""
    kind: Any = schema
    for part in key.split("."):
        kind = typing.get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return kind


def _type_name(kind: Any) -> str:
    """A type in words: "int", "several float", "int or null"."""
    members = typing.get_args(kind)
    if is_dataclass(kind):
        return "a mapping of settings"
    if typing.get_origin(kind) is tuple:
        return f"several {_type_name(members[0])}"
    if members:
        return " or ".join("null" if member is type(None) else _type_name(member) for member in members)
    return {"str": "text", "bool": "true or false"}.get(kind.__name__, kind.__name__)


def _read_layers(path: Path, below: tuple[Path, ...] = ()) -> list[dict[str, Any]]:
    """The file and what it extends, the base first."""
    place = Path(os.path.realpath(path))
    if place in below:
        raise ValueError(f"{path}: extends itself through {' -> '.join(p.name for p in below)}; break the circle")
    if len(below) == MAX_EXTENDED:
        raise ValueError(f"{below[0]}: extends more than {MAX_EXTENDED} files, one on top of the other; join some")
    layer = read_yaml(path)
    if not isinstance(layer, dict):
        raise ValueError(f"{path}: holds a {type(layer).__name__}, a config is a mapping of settings")
    base = layer.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends is {_shortened(repr(base))}; it must be the name of one file")
    return ([] if base is None else _read_layers(path.parent / base, (*below, place))) + [layer]


def _refuse_unknown_keys(schema: type, layer: dict[str, Any], source: str, prefix: str = "") -> None:
    known = typing.get_type_hints(schema)
    for key, value in layer.items():
        if key not in known:
            raise ValueError(f"{source}: unknown key '{prefix}{key}'; {nearest(str(key), list(known), prefix)}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _refuse_unknown_keys(known[key], value, source, f"{prefix}{key}.")


def nearest(key: str, known: list[str], prefix: str = "") -> str:
    """A question that names the most similar of the known names, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean '{prefix}{close[0]}'?" if close else f"known here: {', '.join(known)}"


def _build(schema: type, node: Any, prefix: str = "") -> Any:
    """A frozen dataclass from a merged OmegaConf node; lists become tuples."""
    from omegaconf import OmegaConf

    values = {}
    for name, kind in typing.get_type_hints(schema).items():
        if OmegaConf.is_missing(node, name):
            raise ValueError(f"setting '{prefix}{name}' is missing; give it in the config or as {prefix}{name}=...")
        value = node[name]
        if is_dataclass(kind):
            value = _build(kind, value, f"{prefix}{name}.")
        elif OmegaConf.is_sequence(value):
            value = tuple(value)
        _refuse_unfit(f"{prefix}{name}", value)
        values[name] = value
    return schema(**values)


def describe_schema(schema: type, prefix: str = "  ") -> str:
    """One line per setting: its dotted name, type and default, and the comment that it has in the source."""
    hints, comments = typing.get_type_hints(schema), _comments(schema)
    lines = []
    for item in fields(schema):
        kind = hints[item.name]
        if is_dataclass(kind):
            lines.append(describe_schema(kind, f"{prefix}{item.name}."))
            continue
        default = item.default if item.default is not MISSING else "required"
        shown = "empty" if default in ("", ()) else default
        lines.append(f"{prefix}{item.name}  ({_type_name(kind)}) {shown}{comments.get(item.name, '')}")
    return "\n".join(lines)


def _comments(schema: type) -> dict[str, str]:
    """What the source says of each setting of a dataclass, behind a #."""
    comments: dict[str, str] = {}
    for parent in reversed(schema.__mro__):
        if is_dataclass(parent):
            lines = inspect.getsource(parent).splitlines()
            found = (re.match(r"    (\w+): [^#]*(#.*)$", line) for line in lines)
            comments |= {match[1]: f"  {match[2]}" for match in found if match}
    return comments


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run's config.yaml by their dotted names, whatever version wrote it; none if it is not there.

    Raises:
        ValueError: not YAML, or not a mapping.
    """
    flat = flatten(_read_layers(path)[-1]) if path.is_file() else {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}


def to_yaml(config: Any) -> str:
    """A config as YAML that `--config` reads back."""
    import yaml

    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, default_flow_style=None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def one_line(error: Exception) -> str:
    """What an error says, in one line of characters that can be shown."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    said = " ".join(str(error).split())
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in said)
