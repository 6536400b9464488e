"""YAML that others may have written: plain settings, or refused with the place and what to do.

Only mappings, lists, text, numbers, true, false and null. What makes YAML dangerous or surprising - tags, anchors and
aliases, several documents, references ${...} to the environment, keys given twice - is refused, never interpreted.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from data_pipeline.files.strict_json import read_regular_file

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_CHARACTERS = 10_000  # of one value
MAX_VALUES = 5_000  # of one file; the settings of a run are some hundred
NAME = re.compile(r"[\w.-]{1,100}")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,30})")
FLOAT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")  # 8e-5 too, without a point
NOT_FINITE = re.compile(r"([-+]?\.(inf|Inf|INF))|\.(nan|NaN|NAN)")
WORDS = {"": None, "~": None, "null": None} | dict.fromkeys(("true", "yes", "on"), True)
WORDS |= dict.fromkeys(("false", "no", "off"), False)
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8 with a byte order mark", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
READER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # whose parser, the part that is used here, is much faster


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: no regular file, too large, not YAML, or more than plain values; names the file and the line.
    """
    try:
        content = read_regular_file(path, max_bytes=MAX_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such config file; the ones that come with the project are in configs/")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; a config is a small text file") from None
    for mark, name in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise ValueError(f"{path}: is {name}; save it as plain UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: not valid YAML: no UTF-8 text; save it as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The plain values in a YAML text; `source` names it in errors (ValueError)."""
    try:
        return _Builder(source).build(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{source}: line {line}: not valid YAML: character {error.character:#x}; remove it") from None
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{source}: {place}not valid YAML: {error.problem or error.context}; correct it") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}; correct it") from None


class _Builder:
    """Plain values from the parser's events, one after another: nothing is composed, resolved or constructed."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.result: Any = None
        self._num_values = 0
        self._open: list[dict[str, Any] | list[Any]] = []
        self._keys: list[str | None] = []  # of each open collection the key whose value comes next

    def build(self, text: str) -> Any:
        documents = 0
        for event in yaml.parse(text, Loader=READER):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._refuse(event, "a second document begins here (---); a config is one")
            elif isinstance(event, (yaml.CollectionEndEvent)):
                self._open.pop()
                self._keys.pop()
            elif isinstance(event, yaml.NodeEvent):
                self._take(event)
        return self.result

    def _take(self, event: yaml.NodeEvent) -> None:
        self._refuse_magic(event)
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            self._refuse(event, f"more than {MAX_VALUES} names and values; a config is a small file")
        if isinstance(event, yaml.ScalarEvent):
            if self._wants_key():
                self._take_key(event)
            else:
                self._put(event, self._value(event))
            return
        if self._wants_key():
            self._refuse(event, "a key that is no text; keys are names of settings")
        if len(self._open) == MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        collection: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._put(event, collection)
        self._open.append(collection)
        self._keys.append(None)

    def _wants_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1], dict) and self._keys[-1] is None

    def _put(self, event: yaml.NodeEvent, value: Any) -> None:
        if not self._open:
            self.result = value
        elif isinstance(self._open[-1], list):
            self._open[-1].append(value)
        else:
            self._open[-1][self._keys[-1]] = value
            self._keys[-1] = None

    def _take_key(self, event: yaml.ScalarEvent) -> None:
        key = event.value
        if not NAME.fullmatch(key) or not (event.style or isinstance(_meaning(key), str)):
            self._refuse(event, f"the key {key[:40]!r} is no name of a setting; names are letters, digits and _")
        if key in self._open[-1]:
            self._refuse(event, f"'{key}' is given twice; leave one of them")
        self._keys[-1] = key

    def _value(self, event: yaml.ScalarEvent) -> Any:
        value = event.value
        if len(value) > MAX_CHARACTERS:
            self._refuse(event, f"a value of {len(value)} characters, at most {MAX_CHARACTERS} are accepted")
        if "${" in value:
            self._refuse(event, "a reference ${...}, which could read the environment; write the value itself")
        if not event.implicit[0]:
            return value
        if NOT_FINITE.fullmatch(value):
            self._refuse(event, f"{value} is no number that a setting can have; write a finite one")
        return _meaning(value)

    def _refuse_magic(self, event: yaml.NodeEvent) -> None:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self._refuse(event, f"an anchor or alias ({sign}{event.anchor[:40]}); write the value itself")
        if event.tag is not None:
            self._refuse(event, f"a tag ({event.tag[:80]}); settings are plain values, write it without")

    def _refuse(self, event: yaml.Event, reason: str) -> NoReturn:
        mark = event.start_mark
        raise ValueError(f"{self.source}: line {mark.line + 1}, column {mark.column + 1}: {reason}")


def _meaning(word: str) -> Any:
    """What a word without quotes stands for."""
    if word.lower() in WORDS and word in (word.lower(), word.title(), word.upper()):
        return WORDS[word.lower()]
    if INTEGER.fullmatch(word):
        return int(word.replace("_", ""))
    if FLOAT.fullmatch(word) and not word.lstrip("+-").isdigit():
        number = float(word.replace("_", ""))
        return number if math.isfinite(number) else word
    return word
