"""The command with its verbs: which of them gets what, and what is no verb."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from launchers import scaling_study
from launchers.scaling_study import VERBS, take_verb
from launchers.setup.config_files import load_config, to_yaml
from launchers.study.config import STUDY, StudyConfig


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["scaling_study.py", *arguments])
    try:
        scaling_study.main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_folder_stands_for_the_settings_that_lie_in_it(tmp_path: Path) -> None:
    (tmp_path / STUDY).write_text("")
    settings = ["--config", str(tmp_path / STUDY), f"folder={tmp_path}"]  # wherever the folder was when it was made
    assert take_verb(["plan", str(tmp_path), "plan.pflop=3"]) == ("plan", [*settings, "plan.pflop=3"])
    assert take_verb(["run", "--config", "x.yaml"]) == ("run", ["--config", "x.yaml"])
    assert take_verb(["run", "folder=x"]) == ("run", ["folder=x"])
    assert take_verb(["paper"]) == ("paper", [])
    with pytest.raises(ValueError, match="paper takes no folder"):
        take_verb(["paper", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no verb given; known: run, fit, report, plan, paper, sync"),
        (["rum"], "'rum' is no verb; did you mean 'run'?"),
        (["--config", "x.yaml"], "'--config' is no verb; "),
        (["fit", "nowhere"], "nowhere: is not the folder of a study"),
    ],
)
def test_what_is_no_verb_or_no_study_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert call(monkeypatch, *arguments) == 64
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words}") and said.count("\n") == 1


def test_every_verb_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in VERBS) and "fit.irreducible" in said


@pytest.mark.parametrize("name", ["other", "007", "a b"])
def test_a_study_that_was_moved_works_in_its_new_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    (tmp_path / name / STUDY).write_text(to_yaml(StudyConfig(folder="runs/first", sizes=("a.yaml",))))
    assert call(monkeypatch, "report", name, "--print-config") == 0
    said = capsys.readouterr().out
    Path("shown.yaml").write_text(said)
    assert load_config(StudyConfig, "shown.yaml").folder == name
    assert call(monkeypatch, "report", name) == 64 and f"{name}: no run there" in capsys.readouterr().err


def test_the_papers_laws_need_no_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "paper") == 0
    assert "note: " in capsys.readouterr().out


def test_command_and_laws_import_neither_torch_nor_scipy_nor_matplotlib() -> None:
    """--help and an error of a config show at once; scipy and matplotlib wait for the verbs that need them."""
    files = [*(ROOT / "training" / "laws").glob("[a-z]*.py"), *(ROOT / "training" / "tracking").glob("[a-z]*.py")]
    modules = ", ".join(f"training.{file.parent.name}.{file.stem}" for file in files)
    absent = {"torch", "scipy", "matplotlib", "mlflow"}
    program = f"import launchers.scaling_study, {modules}, sys; print({absent} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr
