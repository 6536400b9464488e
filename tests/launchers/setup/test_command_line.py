"""From arguments to a config, and from an exception to one line: how settings are written, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launchers.setup.command_line import Command, parse, refuse_several_ranks, run_launcher
from launchers.setup.config_files import load_config
from training.supervision.divergence import TrainingDiverged
from training.supervision.stopping import Stopped


@dataclass(frozen=True)
class Model:
    depth: int
    gate: bool = True


@dataclass(frozen=True, kw_only=True)
class Schema:
    run: str = field(metadata={"is_bare": True})
    seed: int = 0
    per_class: int | None = 1
    box: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    feather: bool = False
    model: Model = field(default_factory=lambda: Model(depth=2))


def parsed(*arguments: str) -> Command[Schema]:
    command = parse(Schema, arguments, "a launcher")
    assert command is not None
    return command


@pytest.fixture(autouse=True)
def no_launcher_above(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEXTSCALE_TRACEBACK", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("seed=8", {"seed": 8}),
    ("--seed 8", {"seed": 8}),
    ("--seed -8", {"seed": -8}),
    ("--per-class 8", {"per_class": 8}),
    ("--per_class 8", {"per_class": 8}),
    ("--per-class null", {"per_class": None}),
    ("model.depth=8", {"model": Model(depth=8)}),
    ("--box 0 .5 8 -8", {"box": (0.0, 0.5, 8.0, -8.0)}),
    ("--box 0 0 seed=8", {"box": (0.0, 0.0), "seed": 8}),
    ("--box 0 0 --seed 8", {"box": (0.0, 0.0), "seed": 8}),
    ("box=[0,8]", {"box": (0.0, 8.0)}),
    ("--names it's a,b 007", {"names": ("it's", "a,b", "007")}),
    ("--feather", {"feather": True}),
    ("--feather seed=8", {"feather": True, "seed": 8}),
    ("--feather --seed 8", {"feather": True, "seed": 8}),
    ("--feather no", {"feather": False}),
    ("--seed 1 seed=2", {"seed": 2}),
    ("seed=2 --seed 3 --seed 1", {"seed": 1}),
    ("--local_rank=0 seed=3", {"seed": 3}),
]


@pytest.mark.parametrize(("line", "wanted"), WRITTEN)
def test_a_setting_is_written_with_or_without_dashes_and_the_last_one_wins(line: str, wanted: dict[str, Any]) -> None:
    assert parsed("run=r", *line.split()).config == Schema(**{"run": "r"} | wanted)


@pytest.mark.parametrize(
    "run", ["007", "true", "null", "a: b", "[1]", "#no", "it's", "runs/cfg=4", "a,b", " ", "1e3", "12:30"]
)
def test_a_name_given_to_an_option_is_taken_to_the_letter(run: str) -> None:
    assert parsed("--run", run, "--names", run.replace("=", "-")).config.run == run


def test_a_setting_marked_so_may_be_given_without_its_name() -> None:
    assert parsed("runs/007", "seed=2").config == Schema(run="runs/007", seed=2)
    assert parsed("--seed", "2", "null").config == Schema(run="null", seed=2)


def test_options_and_settings_come_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run: r\nmodel: {depth: 1, gate: false}\n")
    options = ["--dry-run", "model.depth=5", "--world-size", "8", "--config", str(tmp_path / "a.yaml")]
    command = parsed("seed=3", *options, "--feather")
    assert (command.dry_run, command.world_size) == (True, 8)
    assert command.config == Schema(run="r", seed=3, feather=True, model=Model(depth=5, gate=False))
    assert not parsed("r").dry_run and parsed("r").world_size is None


REFUSED = {
    "--no-such-thing x": "unknown option '--no-such-thing'; known here: --run, --seed",
    "--per-clas 8": "unknown option '--per-clas'; did you mean '--per-class'?",
    "--dryrun": "unknown option '--dryrun'; did you mean '--dry-run'?",
    "-x": "unknown option '-x'",
    "--seed=8": "'--seed=8' is not how a setting is written; write seed=8 or --seed 8",
    "--per-class=8": "write per_class=8 or --per-class 8",
    "--model.depth=8": "'--model.depth=8' is not how a setting is written; write model.depth=8",
    "--model.depth 8": "'--model.depth' is not how a setting is written; write model.depth=VALUE",
    "--model 3": "--model has settings of its own; write model.NAME=VALUE",
    "model.dept=3": "unknown key 'model.dept'; did you mean 'model.depth'?",
    "--seed": "--seed is given no value; write --seed VALUE",
    "--seed --feather": "--seed is given no value",
    "--box --feather": "--box is given no value",
    "--seed one": "'seed' is 'one', expected int",
    "--box a": "'box' is ['a'], expected several float",
    "--seed 1 2": "'2' is not a setting; write it as a.b=c",
    "--feather perhaps": "'perhaps' is not a setting",
    "--run ${oc.env:HOME}": "setting 'run' has a reference ${...}",
    "--world-size 4": "it is a number of GPUs, 1 or more, for --dry-run",
    "--world-size 0 --dry-run": "it is a number of GPUs, 1 or more, for --dry-run",
    "--config": "expected one argument",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_no_option_is_refused_in_one_line_that_shows_the_right_spelling(line: str) -> None:
    with pytest.raises(ValueError) as caught:
        parsed("r", *line.split())
    assert REFUSED[line] in str(caught.value) and "\n" not in str(caught.value)


def test_the_printed_config_reads_back_as_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["r", "--box", "1", "3", "--names", "007", "model.gate=no", "--per-class", "null"]
    assert parse(Schema, [*arguments, "--print-config"], "a launcher") is None
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(Schema, str(tmp_path / "printed.yaml")) == parsed(*arguments).config


def launched(monkeypatch: pytest.MonkeyPatch, launch: object, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["launcher.py", *arguments])
    run_launcher(Schema, launch, "a launcher")


def ending(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: str) -> int:
    """The exit code of a launcher that raises."""

    def fail(command: Command[Schema]) -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        launched(monkeypatch, fail, "r", *arguments)
    return left.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("two\n lines"), 64, "error: two lines\n"),
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
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("os._exit", sys.exit)
    return slept


@pytest.mark.parametrize(
    ("error", "code", "said"),
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


def test_only_the_first_rank_says_that_the_run_stopped_and_shows_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second_of_two: list[float]
) -> None:
    assert ending(monkeypatch, Stopped("SIGTERM on rank 0", Path("r"))) == 75
    for option in ("--dry-run", "--print-config"):
        with pytest.raises(SystemExit) as left:
            launched(monkeypatch, lambda command: pytest.fail("launched"), "r", option)
        assert left.value.code == 0
    assert capsys.readouterr() == ("", "") and second_of_two == []


def test_what_writes_one_folder_runs_on_one_process(second_of_two: list[float]) -> None:
    with pytest.raises(ValueError, match=r"a\.py runs on one process; start it with `python launchers/a\.py`"):
        refuse_several_ranks("a.py")


def test_a_bad_setting_never_launches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        launched(monkeypatch, lambda command: pytest.fail("launched"), "r", "model.dpeth=1")
    assert left.value.code == 64
    assert capsys.readouterr().err == "error: command line: unknown key 'model.dpeth'; did you mean 'model.depth'?\n"


def test_a_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NEXTSCALE_TRACEBACK", "1")
    assert ending(monkeypatch, ValueError("x"), "nothing=1") == 64
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1].startswith("error: command line: unknown key 'nothing'")


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: Command[Schema]) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        launched(monkeypatch, fail, "r")
