"""The job scripts, with Slurm's commands replaced by stubs that note how they were called.

A real Slurm runs them in test_slurm_cycle.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository import ROOT

# two tasks on two nodes; as the real one, it ends with the highest code of all
SRUN = """#!/bin/bash
echo "$*" >> "$NOTES/srun"
while [[ $1 == --* ]]; do shift; done
highest=0 pids=()
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_STEP_ID=0 SLURMD_NODENAME=node$rank "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait $pid; code=$?; ((code > highest)) && highest=$code; done
echo $highest >> "$NOTES/srun_codes"
exit $highest
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$NOTES/scontrol"
case $* in
    *hostnames*) echo node0; echo node1 ;;
    *"show node node0"*) echo "NodeName=node0 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=node0 Version=22" ;;
    requeue*) exit "${CANNOT_REQUEUE:-0}" ;;
esac
"""
SCANCEL = """#!/bin/bash
echo "$*" >> "$NOTES/scancel"
"""
# takes `code=N`, `saves=true`, `reason=WORDS` and `killed=RANK` among its arguments
LAUNCHER = f"""
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from training.supervision.history import STOP, History
"""
LAUNCHER += """
settings = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
if "--print-config" in sys.argv:
    if settings.get("code") == "usage":
        sys.exit(64)
    print("run: 'runs/a b'")
    sys.exit()
rank = os.environ["SLURM_PROCID"]
temporary = Path(os.environ["TMPDIR"])
(temporary / "left").write_text("behind")
note = Path(os.environ["NOTES"]) / f"rank{rank}"
note.write_text("\\n".join([*sys.argv[1:], str(temporary), oct(temporary.stat().st_mode), os.environ["MASTER_ADDR"]]))
if settings.get("saves") and rank == "0":
    Path(f"runs/a b/checkpoints/step-{time.time_ns()}").mkdir(parents=True)
if settings.get("reason") and rank == "0":
    History(Path("runs/a b")).note(STOP, checkpoint="step-1", reason=settings["reason"])
if settings.get("killed") == rank:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.1 * int(rank))
sys.exit(int(settings.get("code", 0)))
"""


@dataclass(frozen=True)
class Cluster:
    """A folder with a stand-in for the repository, the stubs, and what they noted."""

    folder: Path

    def submit(self, job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a job script as Slurm would: a copy of it, elsewhere."""
        copy = self.folder / "spool-script"
        copy.write_text((ROOT / "launchers" / "slurm" / job).read_text())
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        return subprocess.run(
            ["bash", str(copy), *arguments],
            env=inherited
            | {
                "PATH": f"{self.folder}/stubs:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "NOTES": str(self.folder / "notes"),
                "TMPDIR": str(self.folder / "tmp"),
                "SLURM_SUBMIT_DIR": str(self.folder / "home"),
                "SLURM_JOB_ID": "42",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_NODELIST": "node[0-1]",
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def noted(self, name: str) -> list[str]:
        note = self.folder / "notes" / name
        return note.read_text().splitlines() if note.exists() else []

    @property
    def requeued(self) -> list[str]:
        return [line.removeprefix("requeue ") for line in self.noted("scontrol") if line.startswith("requeue ")]

    @property
    def run(self) -> Path:
        return self.folder / "home" / "runs" / "a b"


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    for name in ("stubs", "notes", "tmp", "home/launchers"):
        (tmp_path / name).mkdir(parents=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (tmp_path / "stubs" / name).write_text(text)
        (tmp_path / "stubs" / name).chmod(0o755)
    (tmp_path / "home/launchers/train.py").write_text(LAUNCHER)
    (tmp_path / "home/launchers/train_tokenizer.py").write_text(LAUNCHER)
    (tmp_path / "home/launchers/slurm").symlink_to(ROOT / "launchers" / "slurm")
    return Cluster(tmp_path)


def test_the_scripts_are_bash_and_the_job_asks_to_be_warned_and_to_be_requeued_into_the_same_log() -> None:
    for script in (ROOT / "launchers" / "slurm").iterdir():
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = (ROOT / "launchers" / "slurm" / "train.sbatch").read_text()
    options = " ".join(line for line in text.splitlines() if line.startswith("#SBATCH"))
    for option in ("--signal=USR1@120", "--requeue", "--open-mode=append", "--output=%x-%"):
        assert option in options, option
    assert "$0" not in text.replace("not from $0", ""), "Slurm runs a copy of the script elsewhere"


def test_a_run_that_was_stopped_is_requeued_once(cluster: Cluster) -> None:
    assert cluster.submit("train.sbatch", "a.yaml", "code=75", "saves=true").returncode == 75
    assert cluster.requeued == ["42"]
    assert cluster.noted("srun_codes") == ["0"], "for srun no failure: it would end the tasks that are still leaving"
    assert not list(cluster.run.glob(".slurm-*")), "nothing is left in the run folder"


def test_only_steps_between_two_stops_let_the_requeueing_go_on(cluster: Cluster) -> None:
    for saves, requeued in (("", 1), ("true", 2), ("", 3)):  # stopping once without a step may be bad luck
        cluster.submit("train.sbatch", "a.yaml", "code=75", f"saves={saves}")
        assert cluster.requeued == ["42"] * requeued
    again = cluster.submit("train.sbatch", "a.yaml", "code=75")
    assert again.returncode == 75 and cluster.requeued == ["42"] * 3
    assert "stopped twice without a step between" in again.stderr
    assert not list(cluster.run.glob(".slurm-*"))


@pytest.mark.parametrize("code", [0, 64, 70, 76, 143])
def test_other_codes_end_the_job_with_that_code(cluster: Cluster, code: int) -> None:
    assert cluster.submit("train.sbatch", "a.yaml", f"code={code}").returncode == code
    assert not cluster.requeued
    assert not list(cluster.run.glob(".slurm-*"))


def test_a_rank_that_is_killed_fails_the_job_and_takes_the_others_down(cluster: Cluster) -> None:
    assert cluster.submit("train.sbatch", "a.yaml", "killed=1").returncode == 137
    assert cluster.noted("scancel") == ["--quiet --signal=KILL 42.0"]
    assert not cluster.requeued


def test_the_first_code_counts_not_the_highest(cluster: Cluster) -> None:
    """Rank 0 stops with 70; what srun then does to the others must not hide it."""
    launcher = cluster.folder / "home/launchers/train.py"
    launcher.write_text(LAUNCHER.replace('int(settings.get("code", 0))', '70 if rank == "0" else 143'))
    assert cluster.submit("train.sbatch", "a.yaml").returncode == 70
    assert not cluster.noted("scancel"), "only a rank that was killed needs the others to be killed"


def test_a_run_that_its_user_stopped_by_a_file_stays_stopped(cluster: Cluster) -> None:
    stopped = ("train.sbatch", "a.yaml", "code=75", "saves=true")
    assert cluster.submit(*stopped, "reason=runs/x/stop was made").returncode == 75
    assert not cluster.requeued
    cluster.submit(*stopped, "reason=SIGUSR1 on rank 1")
    assert cluster.requeued == ["42"], "the next start is as any other"


def test_a_cluster_that_does_not_requeue_is_said(cluster: Cluster) -> None:
    done = cluster.submit("train.sbatch", "a.yaml", "code=75", CANNOT_REQUEUE="1")
    assert done.returncode == 75
    assert "error: job 42 cannot be requeued; the same sbatch command goes on from there" in done.stderr


def test_arguments_reach_every_rank_with_an_address_and_a_temporary_folder_of_its_own(cluster: Cluster) -> None:
    cluster.submit("train.sbatch", "a.yaml", "x=1 2", "y={a: 3}", "code=64")
    folders = [cluster.noted(f"rank{rank}")[-3] for rank in (0, 1)]
    assert folders[0] != folders[1] and all(folder.startswith(f"{cluster.folder}/tmp/") for folder in folders)
    assert not list((cluster.folder / "tmp").iterdir()), "they go with their ranks"
    for rank in (0, 1):
        assert cluster.noted(f"rank{rank}")[-2] == "0o40700"
        assert cluster.noted(f"rank{rank}")[:4] == ["--config", "a.yaml", "x=1 2", "y={a: 3}"]
        assert cluster.noted(f"rank{rank}")[-1] == "10.0.0.7", "the one that Slurm uses"


def test_what_the_user_names_stays(cluster: Cluster) -> None:
    """The address, another launcher, and an element of an array, which is requeued without the rest."""
    element = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "1"}
    stopped = ("launchers/train_tokenizer.py", "a.yaml", "code=75", "saves=true")
    cluster.submit("train.sbatch", *stopped, MASTER_ADDR="10.9.9.9", **element)
    assert cluster.noted("rank0")[-1] == "10.9.9.9" and cluster.requeued == ["40_1"]
    assert "python3 launchers/train_tokenizer.py --config a.yaml" in cluster.noted("srun")[0]
    (cluster.folder / "stubs/srun").write_text(
        '#!/bin/bash\necho "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS" > "$NOTES/cores"\n'
    )
    cluster.submit("train.sbatch", "a.yaml", SLURM_CPUS_PER_TASK="6")
    assert cluster.noted("cores") == ["6 6"], "cores asked of sbatch reach the step"


def test_a_missing_repository_is_one_line(cluster: Cluster) -> None:
    done = cluster.submit("train.sbatch", "a.yaml", SLURM_SUBMIT_DIR="/usr")
    assert done.returncode == 64
    assert done.stderr.splitlines() == [
        "error: no launchers/train.py in /usr; sbatch in the repository's folder, or export NEXTSCALE_HOME"
    ]


def test_the_repository_may_be_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    environment = {"SLURM_SUBMIT_DIR": str(tmp_path / "project"), "NEXTSCALE_HOME": str(cluster.folder / "home")}
    assert cluster.submit("train.sbatch", "a.yaml", **environment).returncode == 0
    assert (tmp_path / "project/runs/a b").is_dir(), "relative paths start where sbatch was typed"


def test_a_wrong_command_line_ends_before_any_rank_starts(cluster: Cluster) -> None:
    assert cluster.submit("train.sbatch", "a.yaml", "code=usage").returncode == 64
    assert not cluster.noted("srun")
    for arguments in ([], ["run=x"]):
        done = cluster.submit("train.sbatch", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (64, 1)
        assert "error: no config is named" in done.stderr


def test_the_environment_of_make_install_is_used_if_it_is_there(cluster: Cluster) -> None:
    python = cluster.folder / "home/.venv/bin/python3"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\necho "$*" >> "$NOTES/python"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert cluster.submit("train.sbatch", "a.yaml").returncode == 0
    assert len([line for line in cluster.noted("python") if line.endswith("launchers/train.py --config a.yaml")]) == 2
