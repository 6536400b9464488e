"""A study whose runs are trained by a script that does in milliseconds what a test says: records, saves, endings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launchers.setup.config_files import build_config, parse_yaml
from launchers.setup.settings import TrainConfig
from launchers.study import run as study_run
from launchers.study import state as study_state
from launchers.study.config import StudyConfig
from training.checkpoints.commit import FORMAT, folder_name, sealed
from training.tracking.record import TrackingConfig

NUM_SAMPLES, GLOBAL_BATCH, STEPS = 40, 4, 10  # of one epoch
SIZE = """tokenizer: runs/tokenizer
model: {{depth: {depth}}}
loop: {{global_batch: 4, epochs: 1}}
"""
# deeds: step:N records and saves up to step N; signal:N to the study; wait for the file `stop`; say:TEXT; exit:N;
# die:N by a signal
SCRIPT = """
import json, os, sys, time
from pathlib import Path

plan = json.loads(Path(__file__).with_name("plan.json").read_text())
run = Path(next(text[4:] for text in sys.argv if text.startswith("run=")))
with (run / "starts").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
start = len((run / "starts").read_text().splitlines())
deeds = plan[run.name][min(start, len(plan[run.name])) - 1]
for deed in deeds:
    name, _, value = deed.partition(":")
    if name == "step":
        with (run / "metrics.jsonl").open("a") as file:
            file.write("".join(line for line in plan["records"][: 2 * int(value)]))
        folder = run / "checkpoints" / f"step-{int(value):08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(plan["manifests"][int(value)])
    elif name == "signal":
        os.kill(os.getppid(), int(value))
    elif name == "die":
        os.kill(os.getpid(), int(value))
    elif name == "wait":
        while not (run / "stop").exists():
            time.sleep(0.01)
    elif name == "say":
        print(value, flush=True)
    elif name == "exit":
        sys.exit(int(value))
"""


def record(kind: str, step: int) -> dict[str, Any]:
    seen = step * GLOBAL_BATCH
    position = {"kind": kind, "step": step, "samples_seen": seen, "epoch": seen / NUM_SAMPLES}
    return position | {"loss_last": 2 / step, "loss_avg": 3 / step, "images_per_second": 8.0}


def write_run(folder: Path, *, step: int, saved: int | None = None, validated: bool = True) -> None:
    """A run folder as a run that took so many steps leaves it."""
    folder.mkdir(parents=True)
    kinds = ("train", "validation") if validated else ("train",)
    lines = [json.dumps(record(kind, n)) for n in range(1, step + 1) for kind in kinds]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if saved is not None:
        checkpoint = folder / "checkpoints" / folder_name(saved)
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_bytes(manifest(saved))


def manifest(step: int) -> bytes:
    facts = {"format": FORMAT, "step": step, "samples_seen": step * GLOBAL_BATCH, "useful_seconds": 1.0}
    return sealed(facts | {"world_size": 1, "model": {}, "identity": {}, "config": {}, "engines": {}, "files": {}})


@cache
def parsed(file: str, settings: tuple[str, ...]) -> TrainConfig:
    return build_config(TrainConfig, [parse_yaml(file, "file"), *map(setting_as_layer, settings)], source="tests")


def setting_as_layer(setting: str) -> dict[str, Any]:
    name, _, value = setting.partition("=")
    section, _, rest = name.partition(".")
    return {section: {rest: parse_yaml(value, name)} if rest else parse_yaml(value, name)}


def load_quickly(schema: type[TrainConfig], file: str, settings: Sequence[str]) -> TrainConfig:
    """load_config that parses a size once, not for every run and test: that is where these tests spent their time."""
    run, seed = (next(text for text in settings if text.startswith(name)) for name in ("run=", "seed="))
    others = tuple(text for text in settings if not text.startswith(("run=", "seed=", "tracking.")))
    return replace(parsed(Path(file).read_text(), (*others, "run=any")), run=run[4:], seed=int(seed[5:]))


class StudyTraining:
    """A study of sizes `a` and `b` in a folder, and what its runs do at each start."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        for depth, name in enumerate("ab", start=1):
            (folder / f"{name}.yaml").write_text(SIZE.format(depth=depth))
        (folder / "train.py").write_text(SCRIPT)
        self.config = StudyConfig(
            folder=str(folder / "study"),
            sizes=(str(folder / "a.yaml"), str(folder / "b.yaml")),
            start=("python", "-S", "-E"),  # in no time: the script needs nothing installed
            tracking=TrackingConfig(mlflow=False),
        )
        self.plan(a=[["step:10"]], b=[["step:10"]])
        monkeypatch.setattr(study_run, "TRAIN", folder / "train.py")
        monkeypatch.setattr(study_run, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(study_state, "load_config", load_quickly)

    def plan(self, **deeds: Sequence[Sequence[str]]) -> None:
        """Say what the runs do, by size: a list of deeds for each start, the last one also for those after it."""
        plan: dict[str, Any] = {f"{size}-seed{seed}": starts for size, starts in deeds.items() for seed in range(3)}
        kinds = ("train", "validation")
        plan["records"] = [json.dumps(record(kind, n)) + "\n" for n in range(1, STEPS + 1) for kind in kinds]
        plan["manifests"] = [manifest(step).decode() for step in range(STEPS + 1)]
        (self.folder / "plan.json").write_text(json.dumps(plan))

    def change(self, **changes: Any) -> None:
        self.config = replace(self.config, **changes)

    def starts(self, name: str) -> list[str]:
        """Return the command lines that have started a run."""
        path = self.folder / "study" / name / "starts"
        return path.read_text().splitlines() if path.exists() else []
