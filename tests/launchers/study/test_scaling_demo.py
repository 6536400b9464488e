"""The scaling demo's own commands on its three smallest sizes: what a known entropy says of the trained models."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from project import ROOT

from training.laws.study_data import LOSSES
from training.tracking.record import RunRecord

CONFIGS = ROOT / "configs" / "synthetic"
SIZES = ("d1", "d2", "d3")


def launch(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "launchers" / words[0]), *words[1:]], cwd=folder, check=True)


@pytest.mark.slow
def test_the_reducible_loss_falls_with_size_and_is_never_negative(tmp_path: Path) -> None:
    launch(tmp_path, "synthesize_codes.py", "--config", str(CONFIGS / "source.yaml"))
    sizes = ",".join(str(CONFIGS / f"{name}.yaml") for name in SIZES)
    study = ("--config", str(CONFIGS / "scaling_study.yaml"), f"sizes=[{sizes}]", "tracking.mlflow=false")
    launch(tmp_path, "scaling_study.py", "run", *study)
    source = json.loads((tmp_path / "data" / "synthetic" / "source.json").read_text())
    for metric in LOSSES:
        own_loss = source[f"validation_{metric}"]
        excess = []
        for name in SIZES:
            records = RunRecord(tmp_path / "runs" / "synthetic" / f"{name}-seed0").read()
            losses = [record[metric] for record in records if record["kind"] == "validation"]
            assert min(losses) > own_loss
            excess.append(losses[-1] - own_loss)
        assert all(larger < smaller for smaller, larger in pairwise(excess))
    launch(tmp_path, "scaling_study.py", "fit", *study)
    launch(tmp_path, "scaling_study.py", "report", *study)
    report = (tmp_path / "runs" / "synthetic" / "report.md").read_text()
    for metric in LOSSES:
        assert f"No evaluation of {metric} lies below what the source itself loses" in report
