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
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_runs import INCIDENTAL
from project import ROOT
from tiny import Study

from data_pipeline.shards.index import Index
from launchers.setup.config_files import to_yaml
from launchers.study.config import StudyConfig
from launchers.study.state import PlannedRun, plan_runs, saved_step
from training.supervision.history import START, History
from training.tracking.record import RunRecord, TrackingConfig

SEED = 5
STEPS = 80  # of about 20 ms, so that kills fall between them
TARGETS = ("study", "run", "both")


class TinyStudy:
    """Two sizes of a few steps, one of them repeated, in a folder of their own with an MLflow of their own."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.folder = folder / "study"
        self.database = folder / "mlflow.db"
        self.file = folder / "scaling_study.yaml"
        folder.mkdir()
        base = study.train_config(checkpoint_every=10, log_every=1, validate_per_decade=4.0)
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
            attempts=9,
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

    def num_records(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("*/metrics.jsonl"))

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


class Killer:
    """Kills the study, its run, or both at once, at a random moment; always the same ones in the same order."""

    def __init__(self, study: TinyStudy) -> None:
        self.study = study
        self.process = study.start()
        self.kills: Counter[str] = Counter()
        self._draw = random.Random(SEED)

    def strike(self, target: str) -> None:
        if self.process.poll() == 0:
            return  # nothing is left to kill
        if self.process.poll() is not None:
            self.process = self.study.start()
        self._wait()
        while target != "study" and not self.study.training() and self.process.poll() is None:
            time.sleep(0.1)
        victims = self.study.training() if target != "study" else []
        victims += [self.process.pid] if target != "run" and self.process.poll() is None else []
        for victim in victims:
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                self.kills[target] += 1
        if target != "run":  # else the study lives, and starts its run again
            self.process.wait()

    def _wait(self) -> None:
        """Until the runs have got a few records on, or, one time in four, for some seconds: a start takes as long."""
        if self._draw.random() < 0.25:
            time.sleep(self._draw.uniform(0.0, 6.0))
            return
        wanted = self.study.num_records() + self._draw.randint(1, STEPS // 3)
        while self.study.num_records() < wanted and self.process.poll() is None:
            time.sleep(0.02)


@pytest.mark.faults
def test_a_study_killed_at_random_ends_as_one_that_was_not(
    study: Study, tmp_path: Path, figures: dict[str, str]
) -> None:
    whole, struck = TinyStudy(study, tmp_path / "whole"), TinyStudy(study, tmp_path / "struck")
    whole.finish()
    killer = Killer(struck)
    for target in TARGETS * 3:
        killer.strike(target)
    killer.process.wait()
    struck.finish()
    for run, other in zip(whole.runs, struck.runs, strict=True):
        assert [record["step"] for record in whole.records(run) if record["kind"] == "train"] == [*range(1, STEPS + 1)]
        assert struck.records(other) == whole.records(run), struck.told()
        assert saved_step(other) == STEPS and not (other.folder / "stop").exists()
    assert struck.names() == whole.names() == ["d1-seed0", "d1-seed1", "d2-seed0", "study"]
    assert whole.points() and struck.points() == whole.points()
    assert set(struck.points().values()) == {1}
    assert set(killer.kills) == set(TARGETS), killer.kills
    resumed = [event for run in struck.runs for event in History(run.folder).events(START) if event["step"]]
    assert resumed, "some run was killed within its steps"
    figures["scaling study: SIGKILLs survived with the same records and MLflow points"] = str(killer.kills.total())
