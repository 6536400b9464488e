"""A study whose processes are killed at random ends as one that was left alone: the same records, the same points."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_runs import INCIDENTAL
from project import ROOT
from tiny import Study

from data_pipeline.index import Index
from launchers.config_files import to_yaml
from launchers.study_config import StudyConfig
from launchers.study_state import PlannedRun, plan_runs, saved_step
from training.tracking import RunRecord, TrackingConfig

KILLS = 8
SEED = 5
STEPS = 12
TARGETS = ("study", "run", "both")


class TinyStudy:
    """Two sizes of a few steps, one of them repeated, in a folder of their own with an MLflow of their own."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.folder = folder / "study"
        self.database = folder / "mlflow.db"
        self.file = folder / "scaling_study.yaml"
        folder.mkdir()
        base = study.train_config(checkpoint_every=3, log_every=2, validate_per_decade=4.0)
        samples = Index.read(study.folder / "codes" / "train").num_samples
        loop = replace(base.loop, epochs=STEPS * base.loop.global_batch / samples)
        for depth in (1, 2):
            size = replace(base, model=replace(base.model, depth=depth), loop=loop)
            (folder / f"d{depth}.yaml").write_text(to_yaml(size))
        self.config = StudyConfig(
            folder=str(self.folder),
            sizes=(str(folder / "d1.yaml"), str(folder / "d2.yaml")),
            seeds=(0, 1),
            repeated=("d1",),
            start=("python",),
            attempts=KILLS + 2,
            tracking=TrackingConfig(uri=f"sqlite:///{self.database}", experiment="kills", curve_unit="MFLOP"),
        )
        self.file.write_text(to_yaml(self.config))
        self.runs = plan_runs(self.config)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "launchers" / "scaling_study.py"), "run", "--config", str(self.file)]
        with (self.folder.parent / "study.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)

    def finish(self) -> None:
        assert self.start().wait(timeout=900) == 0, self.told()

    def told(self) -> str:
        logs = [self.folder.parent / "study.log", *sorted(self.folder.glob("*/log.txt"))]
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists())

    def training(self) -> list[int]:
        """The processes of this study's launchers/train.py."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if str(ROOT / "launchers" / "train.py") in words and any(f"run={self.folder}/" in word for word in words):
                found.append(int(process.name))
        return found

    def records(self, run: PlannedRun) -> list[dict[str, Any]]:
        read = RunRecord(run.folder).read()
        return [{name: value for name, value in record.items() if name not in INCIDENTAL} for record in read]

    def points(self) -> Counter[tuple[str, str, int, float]]:
        """What MLflow has of every run: (run, metric, step, value), counted; all but what depends on the clock."""
        with sqlite3.connect(self.database) as database:
            rows = database.execute(
                "select runs.name, key, step, value from metrics join runs using (run_uuid) "
                "where runs.lifecycle_stage = 'active' and key not like 'speed/%'"
            )
            return Counter(rows.fetchall())

    def names(self) -> list[str]:
        with sqlite3.connect(self.database) as database:
            found = database.execute("select name from runs where lifecycle_stage = 'active' order by name")
            return [name for (name,) in found]


def kill(study: TinyStudy, process: subprocess.Popen[str], target: str) -> int:
    """Kill the study, its run, or both at once; how many processes that were."""
    victims = study.training() if target != "study" else []
    victims += [process.pid] if target != "run" and process.poll() is None else []
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            victims = [other for other in victims if other != victim]
    return len(victims)


@pytest.mark.faults
def test_a_study_killed_at_random_ends_as_one_that_was_not(
    study: Study, tmp_path: Path, figures: dict[str, str]
) -> None:
    whole, struck = TinyStudy(study, tmp_path / "whole"), TinyStudy(study, tmp_path / "struck")
    start = time.monotonic()
    whole.finish()
    seconds = time.monotonic() - start
    draw, kills = random.Random(SEED), Counter[str]()
    for number in range(KILLS):
        process = struck.start()
        time.sleep(draw.uniform(0.1, 0.7) * seconds)
        target = TARGETS[number % len(TARGETS)]
        kills[target] += kill(struck, process, target)
        if target == "run":  # the study starts it again by itself, until it is killed in its turn
            time.sleep(draw.uniform(0.1, 0.3) * seconds)
            kills["study"] += kill(struck, process, "study")
        process.wait()
    struck.finish()
    for run, other in zip(whole.runs, struck.runs, strict=True):
        assert [record["step"] for record in whole.records(run) if record["kind"] == "train"] == [*range(1, STEPS + 1)]
        assert struck.records(other) == whole.records(run), struck.told()
        assert saved_step(other) == STEPS and not (other.folder / "stop").exists()
    assert struck.names() == whole.names() == ["d1-seed0", "d1-seed1", "d2-seed0", "study"]
    assert whole.points() and struck.points() == whole.points()
    assert set(struck.points().values()) == {1}
    assert kills["study"] and kills["run"] and kills["both"], kills
    figures["scaling study: processes killed at random, records and MLflow points unchanged"] = str(kills.total())
