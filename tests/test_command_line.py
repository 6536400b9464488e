"""From arguments to overrides, and from an exception to one line: what options mean, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launchers.command_line import Command, parse, run_launcher, settings_as_overrides
from launchers.config_files import load_config


@dataclass(frozen=True)
class Model:
    depth: int
    gate: bool = True


@dataclass(frozen=True, kw_only=True)
class Schema:
    run: str
    seed: int = 0
    per_class: int | None = None
    box: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    corner: tuple[float, ...] | None = None
    feather: bool = False
    model: Model = field(default_factory=lambda: Model(depth=2))


REQUIRED = ["run=r", "model.depth=2"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def parsed(*arguments: str) -> Command[Schema]:
    command = parse(Schema, arguments, "a launcher")
    assert command is not None
    return command


def test_settings_may_carry_dashes() -> None:
    assert parsed("--run=r", "--model.depth=3", "seed=2").config == Schema(run="r", seed=2, model=Model(depth=3))


def test_the_launchers_rank_comes_first_and_is_ignored(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "run: r\nmodel: {depth: 1}\n")
    assert parsed("--local_rank=0", "--config", file, "seed=3").config.seed == 3


def test_options_and_settings_come_in_any_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "run: r\nmodel: {depth: 1}\n")
    options = ["--dry-run", "model.depth=5", "--world-size", "8", "--config", file]
    command = parsed("seed=3", *options, "--model.gate=false")
    assert (command.dry_run, command.world_size, command.config.seed) == (True, 8, 3)
    assert command.config.model == Model(depth=5, gate=False)
    assert not parsed(*REQUIRED).dry_run and parsed(*REQUIRED).world_size is None


@pytest.mark.parametrize(
    "arguments, overrides",
    [
        (["--seed", "8"], ["seed=8"]),
        (["--seed=8"], ["seed=8"]),
        (["--seed", "-8"], ["seed=-8"]),
        (["--per-class", "8"], ["per_class=8"]),
        (["--per_class", "8"], ["per_class=8"]),
        (["--per-class=8"], ["per_class=8"]),
        (["--model.depth", "8"], ["model.depth=8"]),
        (["--model.gate"], ["model.gate=true"]),
        (["--box", "0", "0", "8", "-8"], ["box=[0,0,8,-8]"]),
        (["--box", "0", "0", "seed=8"], ["box=[0,0]", "seed=8"]),
        (["--box", "0", "0", "--seed", "8"], ["box=[0,0]", "seed=8"]),
        (["--box", "0,0", "model.depth=8"], ["box=[0,0]", "model.depth=8"]),
        (["--box", "[0, 8]"], ["box=[0, 8]"]),
        (["--corner", ".5", "1"], ["corner=[.5,1]"]),
        (["--names", "it's", "a,b"], ["names=['it''s','a,b']"]),
        (["--feather"], ["feather=true"]),
        (["--feather", "seed=8"], ["feather=true", "seed=8"]),
        (["--feather", "--seed", "8"], ["feather=true", "seed=8"]),
        (["--feather", "no"], ["feather=no"]),
        (["--run", "cfg=4"], ["run='cfg=4'"]),
        (["seed=1", "--seed", "2", "seed=3"], ["seed=1", "seed=2", "seed=3"]),
        (["--config", "a.yaml", "--dry-run"], ["--config", "a.yaml", "--dry-run"]),
    ],
)
def test_a_setting_may_be_written_as_an_option(arguments: list[str], overrides: list[str]) -> None:
    assert settings_as_overrides(Schema, arguments) == overrides


def test_options_become_settings() -> None:
    arguments = ["--run", "a b", "--box", "0", "8", "--feather", "model.depth=3", "--names", "x", "--corner", "1"]
    wanted = Schema(run="a b", box=(0, 8), feather=True, model=Model(depth=3), names=("x",), corner=(1.0,))
    assert parsed(*arguments).config == wanted


def test_the_last_one_wins_however_it_is_written() -> None:
    assert parsed(*REQUIRED, "--seed", "1", "seed=2").config.seed == 2
    assert parsed(*REQUIRED, "seed=2", "--seed=3", "--seed", "1").config.seed == 1


@pytest.mark.parametrize("run", ["007", "true", "null", "a: b", "[1]", "#no", "it's", "runs/cfg=4", "a,b", " ", "1e3"])
def test_a_name_given_to_an_option_is_taken_to_the_letter(run: str) -> None:
    assert parsed("--run", run, "--names", run, run).config == Schema(run=run, names=(run, run))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no-such-thing", "x"], "unknown option '--no-such-thing'"),
        (["--fast"], "unknown option '--fast'"),
        (["--per-clas", "8"], "unknown option '--per-clas'; did you mean '--per-class'?"),
        (["--dryrun"], "did you mean '--dry-run'?"),
        (["--per-clas=8"], "unknown key 'per_clas'; did you mean 'per_class'?"),
        (["--model", "3"], "--model has settings of its own; write model.NAME=VALUE"),
        (["--model.dept", "3"], "unknown option '--model.dept'"),
        (["--seed"], "--seed is given no value; write --seed VALUE"),
        (["--seed", "--feather"], "--seed is given no value"),
        (["--box", "--feather"], "--box is given no value"),
        (["--seed", "one"], "'seed' is 'one', expected int"),
        (["--box", "a"], "'box'"),
        (["--seed", "1", "2"], "'2' is not a setting; write it as a.b=c"),
        (["--feather", "perhaps"], "'perhaps' is not a setting"),
        (["-x"], "unrecognized arguments: -x"),
        (["--world-size", "4"], "it is a number of GPUs, 1 or more, for --dry-run"),
        (["--config"], "expected one argument"),
    ],
)
def test_what_is_no_option_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parsed(*REQUIRED, *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_printed_config_reads_back_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*REQUIRED, "--box", "1", "3", "--names", "007", "model.gate=no"]
    assert parse(Schema, [*arguments, "--print-config"], "a launcher") is None
    file = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert load_config(Schema, file) == parsed(*arguments).config


def launched(monkeypatch: pytest.MonkeyPatch, launch: object, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["launcher.py", *arguments])
    run_launcher(Schema, launch, "a launcher")


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("two\n lines"), "error: two lines\n"),
        (FileNotFoundError("x: not there"), "error: x: not there\n"),
        (OSError(28, "No space left on device", "runs/a"), "error: runs/a: No space left on device\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_exit_code_64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    monkeypatch.delenv("NEXTSCALE_TRACEBACK", raising=False)

    def fail(command: Command[Schema]) -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        launched(monkeypatch, fail, *REQUIRED)
    assert left.value.code == 64
    assert capsys.readouterr() == ("", line)


def test_a_bad_setting_never_launches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NEXTSCALE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as left:
        launched(monkeypatch, lambda command: pytest.fail("launched"), *REQUIRED, "model.dpeth=1")
    assert left.value.code == 64
    assert capsys.readouterr().err == "error: command line: unknown key 'model.dpeth'; did you mean 'model.depth'?\n"


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTSCALE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key"):
        launched(monkeypatch, lambda command: None, *REQUIRED, "nothing=1")


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: Command[Schema]) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        launched(monkeypatch, fail, *REQUIRED)
