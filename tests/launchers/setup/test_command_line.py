"""From arguments to overrides, and from an exception to one line: what options mean, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launchers.setup.command_line import Command, parse, run_launcher, settings_as_overrides
from launchers.setup.config_files import load_config
from training.supervision.divergence import TrainingDiverged
from training.supervision.stopping import Stopped


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


@pytest.fixture(autouse=True)
def no_launcher_above(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEXTSCALE_TRACEBACK", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    """The exit code of a launcher that raises."""

    def fail(command: Command[Schema]) -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        launched(monkeypatch, fail, *(arguments or REQUIRED))
    return left.value.code


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("two\n lines"), 64, "error: two lines\n"),
        (FileNotFoundError("x: not there"), 64, "error: x: not there\n"),
        (OSError(28, "No space left on device", "runs/a"), 73, "error: runs/a: No space left on device\n"),
        (TrainingDiverged("the loss is nan"), 70, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    assert ending(monkeypatch, error) == code
    assert capsys.readouterr() == ("", line)


def test_a_run_that_stopped_as_asked_says_so_where_progress_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, Stopped("SIGTERM on rank 0", Path("r/checkpoints/step-00000007"))) == 75
    said, complained = capsys.readouterr()
    assert "SIGTERM on rank 0" in said and "r/checkpoints/step-00000007" in said and said.count("\n") == 1
    assert complained == ""


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """This process is rank 1 of 2; the list gets the seconds it slept, and it ends by SystemExit as ours do at once."""
    slept: list[float] = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launchers.setup.command_line.time.sleep", slept.append)
    monkeypatch.setattr("launchers.setup.command_line.end_process", sys.exit)
    return slept


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("no such file"), 64, "error: rank 1: no such file\n"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), 76, "lost another rank"),
        (KeyError("a bug"), 1, "Traceback"),
    ],
)
def test_a_later_rank_lets_the_first_one_speak_but_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    second_of_two: list[float],
    error: Exception,
    code: int,
    said: str,
) -> None:
    assert ending(monkeypatch, error) == code
    assert 0 < sum(second_of_two) < 5
    assert said in capsys.readouterr().err


def test_only_the_first_rank_says_that_the_run_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second_of_two: list[float]
) -> None:
    assert ending(monkeypatch, Stopped("SIGTERM on rank 0", Path("r"))) == 75
    assert capsys.readouterr() == ("", "") and second_of_two == []


def test_a_bad_setting_never_launches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NEXTSCALE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as left:
        launched(monkeypatch, lambda command: pytest.fail("launched"), *REQUIRED, "model.dpeth=1")
    assert left.value.code == 64
    assert capsys.readouterr().err == "error: command line: unknown key 'model.dpeth'; did you mean 'model.depth'?\n"


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NEXTSCALE_TRACEBACK", "1")
    assert ending(monkeypatch, ValueError("x"), *REQUIRED, "nothing=1") == 64
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1].startswith("error: command line: unknown key 'nothing'")


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: Command[Schema]) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        launched(monkeypatch, fail, *REQUIRED)
