"""A command that runs without the install, or with the install of another checkout, says so in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

COMMANDS = sorted(path.name for path in (ROOT / "launchers").glob("*.py") if "def main()" in path.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_install_is_one_line(command: str) -> None:
    python = [sys.executable, "-S", "-E"]  # the standard library alone
    done = subprocess.run([*python, str(ROOT / "launchers" / command), "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {ROOT} is not installed for ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"-m pip install -e {ROOT}\n")


def test_the_packages_of_another_checkout_are_not_taken(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    command = [sys.executable, str(tmp_path / "launchers" / "pack_images.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"has the packages of {ROOT} installed, not of {tmp_path}" in done.stderr
