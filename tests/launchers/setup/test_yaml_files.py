"""YAML is plain values with one meaning; all else is one line that names the place and the remedy."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_configs import BOMBS, EXPLOITS, OVERRIDES, REFUSED
from peak_memory import BOUND, peak_memory

from launchers.setup.config_files import load_config, one_line
from launchers.setup.settings import TrainConfig
from launchers.setup.yaml_files import parse_yaml

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e300, 1e300) | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(NAMES, inside, max_size=3),
    max_leaves=8,
)


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_config(TrainConfig, str(file) if file else None, overrides)
    message = one_line(caught.value)
    assert message.isprintable() and len(message) < 600 and "Kanarie" not in message
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_config_is_refused_in_one_line_with_its_place(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    path = make(tmp_path)
    message = refusal(file=path)
    assert reason in message and (str(tmp_path) in message or "/dev/zero" in message or "setting '" in message)


@pytest.mark.parametrize("name", EXPLOITS)
def test_no_payload_is_executed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, reason = EXPLOITS[name]
    path = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(file=path)
    assert list(tmp_path.iterdir()) == [path]  # no canary


@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_fills_the_memory_or_the_time(tmp_path: Path, name: str) -> None:
    make, reason = BOMBS[name]
    path, said = make(tmp_path), []
    start = time.monotonic()
    assert peak_memory(lambda: said.append(refusal(file=path))) < BOUND
    assert time.monotonic() - start < 5 and reason in said[0]


@pytest.mark.parametrize("name", OVERRIDES)
def test_settings_on_the_command_line_are_read_as_strictly(name: str) -> None:
    override, reason = OVERRIDES[name]
    assert reason in refusal("run=r", "tokenizer=t", "model.depth=2", override)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_what_safe_yaml_writes_is_read_as_it_was(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value), "a") == value


@pytest.mark.parametrize(
    "text, value",
    [
        ("8e-5", 8e-5),
        (".5", 0.5),
        ("1_000", 1000),
        ("-3", -3),
        ("007", "007"),
        ("0x1F", "0x1F"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("yes", True),
        ("Off", False),
        ("nULL", "nULL"),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("a#b", "a#b"),
        ("=", "="),
        ("a: [1, {b: ~}]\nc: |\n  two\n  lines\n", {"a": [1, {"b": None}], "c": "two\nlines\n"}),
    ],
)
def test_words_mean_what_people_think(text: str, value: object) -> None:
    found = parse_yaml(text, "a")
    assert found == value and type(found) is type(value)


def test_the_environment_never_reaches_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "Kanarie1")
    for text in ("run: ${oc.env:SOME_SECRET}\n", "run: ['a', '${oc.env:SOME_SECRET}']\n"):
        (tmp_path / "a.yaml").write_text(text)
        assert "a reference ${...}, which could read the environment" in refusal(file=tmp_path / "a.yaml")


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:{}[]-,?&*!|>'\"%@`#~ \n\t0.<=", max_size=30) | st.text(max_size=10))
def test_nothing_but_value_error_comes_out(text: str) -> None:
    try:
        parse_yaml(text, "a")
    except ValueError as error:
        assert str(error).startswith("a: ") and "\n" not in str(error)
