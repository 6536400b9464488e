"""From YAML files and overrides to a frozen config and back: who wins, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from launchers.setup.config_files import describe_schema, load_config, nearest, setting_type, to_yaml


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
    decay: float | None = None


@dataclass(frozen=True, kw_only=True)
class Schema:
    run: str  # the folder
    seed: int = 0
    model: Model
    optimizer: Optimizer = field(default_factory=Optimizer)


REQUIRED = ["run=r", "model.depth=2"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refusal(file: str | None, *overrides: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_config(Schema, file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_then_base_then_file_then_overrides(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "run: base\nseed: 1\nmodel: {depth: 1, gate: false}\noptimizer: {rate: 0.1}\n")
    file = write(tmp_path / "top.yaml", "extends: base.yaml\nrun: top\nmodel: {depth: 2}\n")
    config = load_config(Schema, file, ["model.depth=3"])
    assert config.model == Model(depth=3, gate=False)  # override, base
    assert (config.run, config.seed, config.optimizer) == ("top", 1, Optimizer(rate=0.1))  # file, base, base
    assert config.model.sides == (1, 2)  # default


def test_the_last_override_wins() -> None:
    assert load_config(Schema, None, [*REQUIRED, "seed=1", "seed=2"]).seed == 2


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", "run: base\nmodel: {depth: 1}\n")
    write(tmp_path / "sub" / "middle.yaml", "extends: ../base.yaml\nseed: 4\n")
    file = write(tmp_path / "top.yaml", "extends: sub/middle.yaml\n")
    config = load_config(Schema, file)
    assert (config.run, config.seed, config.model.depth) == ("base", 4, 1)


@pytest.mark.parametrize("text, rate", [("8e-5", 8e-5), ("8.0e-5", 8e-5), ("1E-4", 1e-4), ("3", 3.0), (".5", 0.5)])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, text: str, rate: float) -> None:
    # YAML 1.1 takes 8e-5, without a point, for a string
    file = write(tmp_path / "a.yaml", f"run: r\nmodel: {{depth: 1}}\noptimizer: {{rate: {text}}}\n")
    for config in (load_config(Schema, file), load_config(Schema, None, [*REQUIRED, f"optimizer.rate={text}"])):
        assert config.optimizer.rate == rate and type(config.optimizer.rate) is float


def test_lists_become_tuples(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "run: r\nmodel: {depth: 1, sides: [1, 2, 4]}\n")
    assert load_config(Schema, file).model.sides == (1, 2, 4)
    assert load_config(Schema, None, [*REQUIRED, "model.sides=[3]"]).model.sides == (3,)
    hash(load_config(Schema, file))


def test_an_optional_setting_takes_null_and_a_value() -> None:
    assert load_config(Schema, None, [*REQUIRED, "optimizer.decay=null"]).optimizer.decay is None
    assert load_config(Schema, None, [*REQUIRED, "optimizer.decay=0.5"]).optimizer.decay == 0.5


@pytest.mark.parametrize(
    "override, named",
    [
        ("modle.depth=1", "unknown key 'modle'; did you mean 'model'?"),
        ("model.dept=1", "unknown key 'model.dept'; did you mean 'model.depth'?"),
        ("optimizer.zzz=1", "unknown key 'optimizer.zzz'; known here: rate, decay"),
        ("rate=1", "unknown key 'rate'"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(tmp_path: Path, override: str, named: str) -> None:
    assert named in refusal(None, *REQUIRED, override)
    key, _, value = override.partition("=")
    section, _, name = key.rpartition(".")
    text = f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}"
    file = write(tmp_path / "bad.yaml", text)
    assert named in refusal(file) and "bad.yaml" in refusal(file)


@pytest.mark.parametrize(
    "override, value, key",
    [
        ("seed=1.5", "1.5", "seed"),
        ("seed=one", "one", "seed"),
        ("seed=true", "True", "seed"),
        ("optimizer.rate=fast", "fast", "optimizer.rate"),
        ("model.gate=perhaps", "perhaps", "model.gate"),
        ("model.depth=", "None", "model.depth"),
        ("model.depth=[1]", "[1]", "model.depth"),
        ("model=3", "3", "model"),
    ],
)
def test_a_wrong_type_is_refused_naming_value_and_key(override: str, value: str, key: str) -> None:
    message = refusal(None, *REQUIRED, override)
    assert value in message and f"'{key}'" in message


def test_a_value_that_a_dataclass_refuses_is_refused_in_its_words() -> None:
    assert "depth 0 must be 1 or more" in refusal(None, "run=r", "model.depth=0")


@pytest.mark.parametrize(
    "overrides, missing",
    [(["run=r"], "model"), (["model.depth=1"], "run"), (["run=r", "model.gate=false"], "model.depth")],
)
def test_a_missing_setting_is_named(overrides: list[str], missing: str) -> None:
    assert f"'{missing}" in refusal(None, *overrides) and "missing" in refusal(None, *overrides)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "no.yaml")).startswith(f"{tmp_path}/no.yaml: no such config file")
    file = write(tmp_path / "top.yaml", "extends: gone.yaml\n")
    assert refusal(file).startswith(f"{tmp_path}/gone.yaml: no such config file")


def test_a_circle_of_extends_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself through a.yaml -> b.yaml" in refusal(file)
    itself = write(tmp_path / "c.yaml", "extends: c.yaml\n")
    assert "extends itself" in refusal(itself)


@pytest.mark.parametrize(
    "text",
    [
        "- 1\n- 2\n",
        "3\n",
        "just words\n",
        "{\n",
        "a: b: c\n",
        "run: 1\nrun: 2\n",
        "extends: 3\n",
        "extends: [a.yaml, b.yaml]\n",
        "run: !!python/object/apply:os.getcwd []\n",
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    assert "bad.yaml" in refusal(write(tmp_path / "bad.yaml", text))


def test_an_endless_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.yaml"
    with file.open("wb") as handle:
        handle.truncate(2**21)
    assert "2097152 bytes" in refusal(str(file))


@pytest.mark.parametrize("override", ["model.sides=[1,2", "model.depth", "model.depth=${nothing}"])
def test_a_malformed_override_is_refused(override: str) -> None:
    assert refusal(None, *REQUIRED, override)


@pytest.mark.parametrize("run", ["runs/8e-5", "true", "null", "a: b", "é", "007", "", " ", "[1]", "#no"])
def test_any_name_survives_being_written_and_read(tmp_path: Path, run: str) -> None:
    config = Schema(run=run, model=Model(depth=1), optimizer=Optimizer(rate=1e-12))
    assert load_config(Schema, write(tmp_path / "a.yaml", to_yaml(config))) == config


def test_the_printed_config_is_plain_yaml() -> None:
    assert yaml.safe_load(to_yaml(Schema(run="r", model=Model(depth=1))))["model"]["sides"] == [1, 2]


def test_help_lists_every_setting_with_type_and_default() -> None:
    lines = describe_schema(Schema).splitlines()
    assert [line.split()[0] for line in lines] == [
        *["run", "seed", "model.depth", "model.sides", "model.gate", "optimizer.rate", "optimizer.decay"]
    ]
    assert "(text) required" in lines[0] and "(int) 0" in lines[1] and "(float) 0.0001" in lines[5]
    assert lines[0].endswith("# the folder") and "#" not in lines[1]


def test_the_type_of_a_setting_is_found_by_its_dotted_name() -> None:
    assert setting_type(Schema, "model.depth") is int and setting_type(Schema, "model") is Model
    assert setting_type(Schema, "model.gone") is None and setting_type(Schema, "seed.depth") is None


def test_the_nearest_name_is_asked_about_and_without_one_all_are_listed() -> None:
    assert nearest("sead", ["run", "seed"]) == "did you mean 'seed'?"
    assert nearest("zzz", ["run", "seed"]) == "known here: run, seed"
