"""A project folder as a user has it, and the commands typed in it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fork_world import EndedWorld, ForkServer
from repository import ROOT

CONFIGS = ROOT / "configs" / "digits"
SHORT = ["loop.epochs=1", "loop.validate_every=0.25", "loop.checkpoint_every=4", "loop.log_every=1"]
PACK = ["source=digits", "out=data/digits/images", "val_fraction=0.2"]
TOKENIZER = ["--config", str(CONFIGS / "tokenizer.yaml"), "loop.epochs=0.2"]
ENCODE = ["tokenizer=runs/digits/tokenizer", "images=data/digits/images", "out=data/digits/codes", "views=2"]


@dataclass(frozen=True)
class Project:
    """A folder with packed digits, a barely trained tokenizer and its codes."""

    folder: Path

    def command(self, name: str, *arguments: str, ranks: int = 0) -> list[str]:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)] if ranks else []
        return [*(launcher or [sys.executable]), str(ROOT / "launchers" / f"{name}.py"), *arguments]

    def run(self, name: str, *arguments: str, ranks: int = 0) -> Any:
        return subprocess.run(
            self.command(name, *arguments, ranks=ranks),
            cwd=self.folder,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def succeed(self, name: str, *arguments: str, ranks: int = 0) -> str:
        done = self.run(name, *arguments, ranks=ranks)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def fail(self, name: str, *arguments: str, code: int = 64) -> str:
        """Run a command that must end with an exit code and one line on stderr; that line.

        In this process: what is wrong is found before anything starts, and starting Python takes longer than that.
        """
        main = importlib.import_module(f"launchers.{name}").main
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", [f"{name}.py", *arguments])
            main()
        assert left.value.code == code, (left.value.code, said.getvalue()[-2000:])
        return single_error(said.getvalue())

    def records(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class ForkedProject(Project):
    """Where commands run in processes forked from one that has imported everything, not ten seconds later."""

    server: ForkServer

    def forked(self, name: str, *arguments: str, ranks: int = 0) -> str:
        """`succeed` without the start of Python, and of DeepSpeed's launcher where there are ranks."""
        world = self._world(name, *arguments, ranks=ranks)
        assert set(world.exit_codes) == {0}, world.explain()[-6000:]
        return "".join(rank.stdout for rank in world.ranks)

    def fail_as_rank(self, name: str, *arguments: str, env: dict[str, str]) -> str:
        """`fail` where the environment says which rank this is."""
        world = self._world(name, *arguments, ranks=1, environment=env)
        assert world.exit_codes == [64], world.explain()[-6000:]
        return single_error(world.ranks[0].stderr)

    def _world(self, name: str, *arguments: str, ranks: int, **options: Any) -> EndedWorld:
        order = {"name": name, "arguments": arguments, "folder": str(self.folder), "alone": ranks == 0}
        return self.server.run("launcher_worker:launch", order, world_size=max(1, ranks), timeout=300, **options)


def single_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr[-2000:]
    return lines[0]


def train_arguments(run: str, *more: str) -> list[str]:
    return ["--config", str(CONFIGS / "d2.yaml"), f"run={run}", "tracking.mlflow=false", *SHORT, *more]
