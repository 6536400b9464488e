"""`run --slurm`: which jobs are written and submitted, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from study_training import StudyTraining, write_run
from tiny import command

from launchers.study.run import launch_run

SBATCH = """#!/bin/bash
echo "$*" >> "$NOTES/sbatch"
case $* in *"$REFUSED"*) echo "sbatch: error: invalid partition" >&2; exit 1 ;; esac
echo "$((40 + $(wc -l < "$NOTES/sbatch")));cluster"
"""
NOTED = '#!/bin/bash\necho "$*" >> "$NOTES/{name}"\ncat "$NOTES/{name}.says" 2> /dev/null || true\n'


class Cluster(StudyTraining):
    """The study, and commands that note how they are called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        self.notes, stubs = folder / "notes", folder / "stubs"
        self.notes.mkdir()
        stubs.mkdir()
        scripts = {"sbatch": SBATCH} | {name: NOTED.format(name=name) for name in ("squeue", "scancel")}
        for name, text in scripts.items():
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        monkeypatch.setenv("NOTES", str(self.notes))
        monkeypatch.setenv("REFUSED", "nothing")
        monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
        self.change(slurm=True)

    def go(self, **changes: Any) -> None:
        self.change(**changes)
        launch_run(command(self.config))

    def noted(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []

    def script(self, name: str) -> str:
        return (self.folder / "study" / "slurm" / f"{name}.sbatch").read_text()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def arguments_of(script: str, element: int) -> list[str]:
    """What an element of an array would train, by bash itself."""
    cases = script[script.index("case ") : script.index("esac") + 4]
    shown = subprocess.run(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID={element}\n{cases}\nprintf "%s\\n" "${{arguments[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.splitlines()


def test_one_array_trains_all_and_a_job_behind_it_fits(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.go(seeds=(0, 1), repeated=("b",))
    folder = cluster.folder / "study"
    assert cluster.noted("sbatch") == [
        f"--parsable {folder}/slurm/train-1.sbatch",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes {folder}/slurm/fit.sbatch",
    ]
    script = cluster.script("train-1")
    assert "--array=0-2 --signal=USR1@120 --requeue\n" in script and "--open-mode=append" in script
    for element, (size, seed) in enumerate([("a", 0), ("b", 0), ("b", 1)]):
        arguments = arguments_of(script, element)
        assert arguments[:2] == ["--config", str(cluster.folder / f"{size}.yaml")]
        assert {f"run={folder}/{size}-seed{seed}", f"seed={seed}", "tracking.study=study"} <= set(arguments)
    for name in ("train-1", "fit"):
        assert subprocess.run(["bash", "-n"], input=cluster.script(name), text=True).returncode == 0
        assert '. "$home/launchers/slurm/common.sh"' in cluster.script(name)
    for verb in ("fit", "report"):
        assert f'python3 "$home/launchers/scaling_study.py" {verb} {folder}\n' in cluster.script("fit")
    said = capsys.readouterr().out
    assert "job 41: a-seed0, b-seed0, b-seed1; " in said and "job 42: fit and report" in said
    assert json.loads((folder / "slurm" / "jobs.json").read_text()) == ["41", "42"]
    assert (folder / "study.yaml").exists() and not cluster.starts("a-seed0")


def test_sizes_with_options_of_their_own_have_an_array_of_their_own(cluster: Cluster) -> None:
    cluster.go(sbatch=("a,b: --mem=4G", "--nodes=2 --partition=gpu", "b: --nodes=8", "fit: --time=10"))
    assert [line.split()[-1][-14:] for line in cluster.noted("sbatch")[:2]] == ["train-1.sbatch", "train-2.sbatch"]
    assert "--dependency=afterok:41:42 " in cluster.noted("sbatch")[2]
    first, second, fit = (cluster.script(name) for name in ("train-1", "train-2", "fit"))
    assert (
        "#SBATCH --nodes=2 --partition=gpu\n#SBATCH --mem=4G\nset -e" in first
        and "a-seed0" in first
        and "b-seed0" not in first
    )
    assert "#SBATCH --nodes=2 --partition=gpu\n#SBATCH --mem=4G\n#SBATCH --nodes=8\nset -e" in second
    assert "#SBATCH --time=10\nset -e" in fit and "--nodes" not in fit


@pytest.mark.parametrize("entry", ["c: --nodes=2", "nodes=8", "a:", "--nodes=2\n--mem=1"])
def test_options_that_cannot_be_meant_are_refused_before_anything_is_submitted(cluster: Cluster, entry: str) -> None:
    with pytest.raises(ValueError, match="(?s)sbatch has .* known here: a, b, fit"):
        cluster.go(sbatch=(entry,))
    assert not cluster.noted("sbatch")


def test_only_what_is_not_done_is_submitted(cluster: Cluster) -> None:
    write_run(cluster.folder / "study" / "a-seed0", step=10, saved=10)
    cluster.go()
    assert "--array=0-0 " in cluster.script("train-1") and "a-seed0" not in cluster.script("train-1")
    write_run(cluster.folder / "study" / "b-seed0", step=10, saved=10)
    cluster.go()
    assert len(cluster.noted("sbatch")) == 2, "nothing was left to submit"


def test_what_is_in_the_queue_is_not_submitted_again(cluster: Cluster) -> None:
    cluster.go()
    (cluster.notes / "squeue.says").write_text("41\n41\n42\n")
    with pytest.raises(ValueError, match="of this study are in the queue: 41, 42; wait for them, or scancel 41 42"):
        cluster.go()
    with pytest.raises(ValueError, match="in the queue"):
        cluster.go(slurm=False)
    assert cluster.noted("squeue")[-1] == "--noheader --format=%F --jobs=41,42"
    (cluster.notes / "squeue.says").unlink()
    cluster.go(slurm=False)
    assert len(cluster.starts("a-seed0")) == 1


def test_what_slurm_refuses_leaves_no_job_behind(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSED", "train-2")
    with pytest.raises(ValueError, match=r"train-2.sbatch: sbatch refuses it \(sbatch: error: invalid partition\)"):
        cluster.go(sbatch=("b: --partition=none",))
    assert cluster.noted("scancel") == ["41"]
    assert not (cluster.folder / "study" / "slurm" / "jobs.json").exists()


def test_a_machine_without_slurm_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cluster.folder))
    with pytest.raises(ValueError, match="slurm is on, but there is no sbatch here; run `sbatch .*train-1.sbatch`"):
        cluster.go()
