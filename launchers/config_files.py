"""From YAML files and overrides to a frozen config, and back.

Precedence: the defaults in the dataclasses, then the file on top of the files it `extends:`, then the `a.b=c`
overrides. OmegaConf reads and merges; unknown keys and wrong types are errors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from training.checkpoint import flatten

Config = TypeVar("Config")
MAX_CONFIG_BYTES = 2**20


def load_config(schema: type[Config], file: str | None, overrides: Sequence[str] = ()) -> Config:
    """Build a config of class `schema` from a YAML file and overrides.

    Raises:
        FileNotFoundError: the file or one that it extends does not exist.
        ValueError: unknown key, wrong type, missing setting, or a value that a dataclass refuses.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers = _read_layers(Path(file)) if file else []
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"'{override}' is not a setting; write it as a.b=c")
    try:
        layers.append(OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides))))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{' '.join(overrides)}: not valid YAML after '=': {one_line(error)}") from None
    return build_config(schema, layers, source=file or "command line")


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
            return f"'{key}' is {value!r}, expected {_type_name(setting_type(schema, key))}; see --help"
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if path.resolve() in below:
        raise ValueError(f"{path}: extends itself through {' -> '.join(p.name for p in below)}; break the circle")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file; the ones that come with the project are in configs/")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: a lone number
        raise ValueError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(layer, dict):
        raise ValueError(f"{path}: holds a {type(layer).__name__}, a config is a mapping of settings")
    base = layer.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends is {base!r}; it must be the name of one file")
    return ([] if base is None else _read_layers(path.parent / base, (*below, path.resolve()))) + [layer]


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
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
