"""What holds for commands as files: a missing install is one line, and help does not wait for what it does not need."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

WITHOUT_TORCH = ("pack_images", "index_shards", "verify_shards", "scaling_study", "sync_mlflow")


def test_a_missing_install_is_one_line() -> None:
    python = [sys.executable, "-S", "-E"]  # the standard library alone
    command = [*python, str(ROOT / "launchers" / "sync_mlflow.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {ROOT} is not installed for ") and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"-m pip install -e {ROOT}\n")


def test_the_packages_of_another_checkout_are_not_taken(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    command = [sys.executable, str(tmp_path / "launchers" / "pack_images.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"has the packages of {ROOT} installed, not of {tmp_path}" in done.stderr


@pytest.mark.parametrize("command", WITHOUT_TORCH)
def test_help_and_a_wrong_setting_come_without_torch(command: str) -> None:
    """Torch takes two seconds to import, which is too long for a line about a typing mistake."""
    program = f"""
import sys
from launchers import {command}
verb = ["run"] if "{command}" == "scaling_study" else []
for arguments, code in ((["--help"], 0), ([*verb, "no.such_setting=1"], 64)):
    sys.argv = ["{command}.py", *arguments]
    try:
        {command}.main()
    except SystemExit as ended:
        assert ended.code == code, (arguments, ended.code)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and done.stderr.count("\n") == 1 and "unknown key 'no'" in done.stderr
