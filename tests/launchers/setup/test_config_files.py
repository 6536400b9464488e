"""From YAML files and settings to a frozen config and back: who wins, what a text means, and what is refused."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed_configs import BOMBS, EXPLOITS, OVERRIDES, REFUSED
from peak_memory import BOUND, peak_memory

from launchers.setup.config_files import (
    build_config,
    describe_schema,
    load_config,
    nearest,
    parse_yaml,
    read_settings,
    to_yaml,
)
from launchers.setup.exit_codes import one_line
from launchers.setup.settings import TrainConfig


@dataclass(frozen=True)
class Model:
    depth: int
    sides: tuple[int, ...] = (1, 2)
    gate: bool = True

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth {self.depth} must be 1 or more")


@dataclass(frozen=True)
class Optimizer:
    rate: float = 1e-4
    steps: int | None = 5


@dataclass(frozen=True, kw_only=True)
class Schema:
    run: str  # the folder
    seed: int = 0
    names: tuple[str, ...] = ()
    box: tuple[float, ...] = ()
    model: Model
    optimizer: Optimizer = field(default_factory=Optimizer)


REQUIRED = ["run=r", "model.depth=2"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refusal(schema: type, file: Path | str | None, *overrides: str) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        load_config(schema, str(file) if file else None, overrides)
    message = one_line(caught.value)
    assert message.isprintable() and len(message) < 600 and "Kanarie" not in message
    return message


def test_defaults_then_base_then_file_then_settings(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "run: base\nseed: 1\nmodel: {depth: 1, gate: false}\noptimizer: {rate: 0.1}\n")
    file = write(tmp_path / "top.yaml", "extends: base.yaml\nrun: top\nmodel: {depth: 2}\n")
    config = load_config(Schema, file, ["model.depth=3", "seed=2", "seed=4"])
    assert config.model == Model(depth=3, gate=False, sides=(1, 2))  # setting, base, default
    assert (config.run, config.seed, config.optimizer) == ("top", 4, Optimizer(rate=0.1))  # file, last setting, base


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "run: base\nmodel: {depth: 1}\n")
    write(tmp_path / "sub" / "middle.yaml", "extends: ../base.yaml\nseed: 4\n")
    config = load_config(Schema, write(tmp_path / "top.yaml", "extends: sub/middle.yaml\n"))
    assert (config.run, config.seed, config.model.depth) == ("base", 4, 1)


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself through a.yaml -> b.yaml" in refusal(Schema, file)


MEANINGS = [
    *[("seed", text, value) for text, value in (("8", 8), ("-3", -3), ("1_000", 1000), ("010", 10), ("'8'", 8))],
    *[("optimizer.rate", text, float(text)) for text in ("8e-5", "8.0e-5", "1E-4", "3", ".5", "-1.5")],
    *[("model.gate", text, True) for text in ("true", "True", "yes", "on")],
    *[("model.gate", text, False) for text in ("false", "no", "Off", "FALSE")],
    *[("optimizer.steps", text, None) for text in ("null", "~", "", "NULL")],
    ("optimizer.steps", "7", 7),
    *[("run", text, text) for text in ("12:30", "010", "yes", "1.50", "0x1F", "2024-01-01", "a#b", "=", "1e3", "8_0")],
    ("run", "'null'", "null"),
    ("run", "''", ""),
    ("model.sides", "[]", ()),
    ("model.sides", "[1, 2, 4]", (1, 2, 4)),
    ("names", "[007, yes, 1:30]", ("007", "yes", "1:30")),
    ("box", "[1, .5]", (1.0, 0.5)),
]


@pytest.mark.parametrize(("name", "text", "value"), MEANINGS)
def test_a_text_has_the_type_of_its_field(tmp_path: Path, name: str, text: str, value: Any) -> None:
    """On the command line and in a file; a field of text keeps every letter, whatever YAML makes of it elsewhere."""
    section, _, rest = name.rpartition(".")
    file = write(tmp_path / "a.yaml", f"{section}: {{{rest}: {text}}}" if section else f"{name}: {text}")
    sources: list[tuple[str | None, list[str]]] = [(None, [f"{name}={text}"]), (file, [])]
    for path, given_settings in sources:
        required = [setting for setting in REQUIRED if not setting.startswith(f"{name}=")]
        config = load_config(Schema, path, [*required, *given_settings])
        found = getattr(getattr(config, section) if section else config, rest)
        assert found == value and type(found) is type(value)
        hash(config)


WRONG = {
    "seed=1.5": "'seed' is '1.5', expected int",
    "seed=one": "'seed' is 'one', expected int",
    "seed=true": "'seed' is 'true', expected int",
    "seed=null": "'seed' is null, expected int",
    "run=null": "'run' is null, expected text",
    "run=[a]": "'run' is ['a'], expected text",
    "optimizer.rate=fast": "'optimizer.rate' is 'fast', expected float",
    "optimizer.steps=1.5": "'optimizer.steps' is '1.5', expected int or null",
    "model.gate=perhaps": "'model.gate' is 'perhaps', expected true or false",
    "model.depth=[1]": "'model.depth' is ['1'], expected int",
    "model.sides=3": "'model.sides' is '3', expected several int",
    "model.sides=[1,two]": "'model.sides' is ['1', 'two'], expected several int",
    "model=3": "'model' is '3', expected a mapping of settings",
    "modle.depth=1": "unknown key 'modle'; did you mean 'model'?",
    "model.dept=1": "unknown key 'model.dept'; did you mean 'model.depth'?",
    "optimizer.zzz=1": "unknown key 'optimizer.zzz'; known here: rate, steps",
    "model.depth=0": "depth 0 must be 1 or more",
}


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_key_or_value_is_named_with_what_is_expected(tmp_path: Path, setting: str) -> None:
    assert WRONG[setting] in refusal(Schema, None, *REQUIRED, setting)
    name, _, value = setting.partition("=")
    section, _, rest = name.rpartition(".")
    file = write(tmp_path / "bad.yaml", f"{section}: {{{rest}: {value}}}" if section else f"{name}: {value}")
    assert WRONG[setting] in refusal(Schema, file, *(REQUIRED if "depth=0" not in setting else REQUIRED[:1]))


@pytest.mark.parametrize(
    ("given_settings", "missing"),
    [(["run=r"], "model"), (["model.depth=1"], "run"), (["run=r", "model.gate=false"], "model.depth")],
)
def test_a_missing_setting_is_named(given_settings: list[str], missing: str) -> None:
    assert f"setting '{missing}' is missing; give it" in refusal(Schema, None, *given_settings)


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_config_is_refused_in_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    make, words = REFUSED[name]
    message = refusal(TrainConfig, make(tmp_path))
    assert words in message and (str(tmp_path) in message or "/dev/zero" in message or "setting '" in message)


@pytest.mark.parametrize("name", EXPLOITS)
def test_no_payload_is_executed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = EXPLOITS[name]
    path = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert words in refusal(TrainConfig, path)
    assert list(tmp_path.iterdir()) == [path]  # no canary


@pytest.mark.parametrize("name", BOMBS)
def test_no_bomb_fills_the_memory_or_the_time(tmp_path: Path, name: str) -> None:
    make, words = BOMBS[name]
    path, said = make(tmp_path), []
    start = time.monotonic()
    assert peak_memory(lambda: said.append(refusal(TrainConfig, path))) < BOUND
    assert time.monotonic() - start < 5 and words in said[0]


@pytest.mark.parametrize("name", OVERRIDES)
def test_settings_on_the_command_line_are_read_as_strictly(name: str) -> None:
    override, words = OVERRIDES[name]
    assert words in refusal(TrainConfig, None, "run=r", "tokenizer=t", "model.depth=2", override)


TEXTS = st.none() | st.text(max_size=20)
VALUES = st.recursive(TEXTS, lambda inside: st.lists(inside, max_size=3), max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=3))
def test_what_safe_yaml_writes_is_read_as_it_was(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value), "a") == value


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:{}[]-,?&*!|>'\"%@`#~ \n\t0.<=", max_size=30) | st.text(max_size=10))
def test_a_text_raises_nothing_but_value_error(text: str) -> None:
    try:
        parse_yaml(text, "a")
    except ValueError as error:
        assert str(error).startswith("a: ") and "\n" not in str(error)


@pytest.mark.parametrize("run", ["runs/8e-5", "true", "null", "a: b", "é", "007", "", " ", "[1]", "#no", "12:30"])
def test_a_config_survives_being_written_and_read(tmp_path: Path, run: str) -> None:
    config = Schema(run=run, model=Model(depth=1), optimizer=Optimizer(rate=1e-12, steps=None), box=(1e-5, 2.0))
    file = write(tmp_path / "a.yaml", to_yaml(config))
    assert load_config(Schema, file) == config
    found = read_settings(Path(file))
    assert found["run"] == run and found["optimizer.rate"] == 1e-12 and found["optimizer.steps"] is None
    assert found["box"] == (1e-5, 2.0) and found["model.gate"] is True and found["model.depth"] == 1
    assert yaml.safe_load(to_yaml(config))["model"]["sides"] == [1, 2]


def test_the_settings_of_a_run_are_none_without_a_file_and_refused_if_hostile(tmp_path: Path) -> None:
    assert read_settings(tmp_path / "none.yaml") == {}
    with pytest.raises(ValueError, match="an anchor or alias"):
        read_settings(Path(write(tmp_path / "a.yaml", "a: &a [1]\nb: *a\n")))


def test_help_lists_every_setting_with_type_default_and_comment() -> None:
    lines = describe_schema(Schema).splitlines()
    names = ["run", "seed", "names", "box", "model.depth", "model.sides", "model.gate", "optimizer.rate"]
    assert [line.split()[0] for line in lines] == [*names, "optimizer.steps"]
    assert "(text) required" in lines[0] and "(int) 0" in lines[1] and "(float) 0.0001" in lines[7]
    assert lines[0].endswith("# the folder") and "#" not in lines[1]


def test_the_nearest_name_is_asked_about_and_without_one_all_are_listed() -> None:
    assert nearest("sead", ["run", "seed"]) == "did you mean 'seed'?"
    assert nearest("zzz", ["run", "seed"]) == "known here: run, seed"


def test_a_home_folder_is_found_wherever_a_path_may_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not see what stands in YAML or behind an equals sign."""
    monkeypatch.setenv("HOME", "/home/anna")
    layers = [{"run": "~/runs/a", "data": {"train": "~/data/train", "validation": "s3://bucket/~"}, "tokenizer": "~"}]
    config = build_config(TrainConfig, [*layers, {"model": {"depth": 2}}], source="a.yaml")
    assert (config.run, config.tokenizer) == ("/home/anna/runs/a", "/home/anna")
    assert (config.data.train, config.data.validation) == ("/home/anna/data/train", "s3://bucket/~")


@pytest.mark.parametrize("text", ["1e5", "1.0e5", "010", "12:30", "yes", "-3", ".5", "1_000", "0x10", "plain"])
def test_text_stays_text_for_every_reader_of_a_runs_settings(tmp_path: Path, text: str) -> None:
    layers = [{"run": "r", "tokenizer": "t", "model": {"depth": 2}, "tracking": {"experiment": text}}]
    config = build_config(TrainConfig, layers, source="a.yaml")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(TrainConfig, str(tmp_path / "config.yaml")) == config
    assert read_settings(tmp_path / "config.yaml")["tracking.experiment"] == text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["tracking"]["experiment"] == text
