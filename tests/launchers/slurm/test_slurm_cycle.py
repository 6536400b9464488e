"""Jobs on a real Slurm of two emulated nodes, typed as a user types them; `make test-slurm`, some minutes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from project import ROOT, Project
from slurm_cluster import SlurmCluster, running_cluster, wait_until, why_not

from training.checkpoints.commit import content_damage, read_manifest, structural_damage
from training.supervision.history import STOP, History

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "Slurm is here")]

SHORT = (
    *("loop.epochs=5", "loop.checkpoint_every=25", "loop.validate_every=2", "loop.log_every=1"),
    "tracking.mlflow=false",
)
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL")
NUM_STEPS = 113  # five epochs of 1,437 digits in batches of 64


@pytest.fixture(scope="module")
def home(project: Project) -> Project:
    """The project's folder with the repository in it, as after `git clone`."""
    for name in ("launchers", "configs"):
        (project.folder / name).symlink_to(ROOT / name)
    return project


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Job:
    """A job of a run, as `sbatch launchers/slurm/train.sbatch configs/digits/d4.yaml` starts it."""

    def __init__(self, cluster: SlurmCluster, home: Project, run: str, *options: str) -> None:
        self.cluster, self.home, self.run = cluster, home, run
        command = ["sbatch", "--parsable", *options, "launchers/slurm/train.sbatch", "configs/digits/d4.yaml"]
        self.number = cluster.ask(*command, f"run={run}", *SHORT, folder=home.folder)

    @property
    def log(self) -> str:
        return (self.home.folder / f"nextscale-{self.number}.log").read_text()

    def told(self, name: str) -> str:
        return self.cluster.job(self.number)[name]

    def wait_for_state(self, *states: str, seconds: float = 600) -> str:
        wait_until(lambda: self.told("JobState") in states, f"job {self.number} is {states}", seconds=seconds)
        return self.told("JobState")

    def wait_for_steps(self, number: int) -> None:
        wait_until(lambda: self.has_steps(number) or self.has_ended(), f"{self.run} took steps", seconds=300)
        assert not self.has_ended(), self.log[-3000:]

    def has_steps(self, number: int) -> bool:
        record = self.home.folder / self.run / "metrics.jsonl"
        return record.exists() and record.read_text().count("\n") >= number

    def has_ended(self) -> bool:
        return self.told("JobState") in ENDED

    def let_the_time_limit_come_near(self) -> None:
        """Two minutes from now or less, the time at which the script wants to be warned."""
        hours, minutes, _ = map(int, self.told("RunTime").split(":"))
        self.update(f"TimeLimit={60 * hours + minutes + 2}")

    def update(self, *settings: str) -> None:
        self.cluster.ask("scontrol", "update", f"JobId={self.number}", *settings)

    def checkpoints(self) -> list[Path]:
        return sorted((self.home.folder / self.run / "checkpoints").glob("step-*"))


def curve(project: Project, run: str) -> list[dict[str, Any]]:
    """All numbers of the record that are not about time, exactly as they were written."""
    kept = ("kind", "step", "samples_seen", "loss", "loss_avg", "loss_last", "error", "gradient_norm", "learning_rate")
    return [{name: record[name] for name in kept if name in record} for record in project.records(run)]


def is_whole(checkpoint: Path) -> bool:
    manifest = read_manifest(checkpoint)
    return not structural_damage(checkpoint) and not content_damage(checkpoint, manifest, list(manifest["files"]))


def processes_of(job: Job) -> list[int]:
    """The Python processes that run as tasks of a job, by rank."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(item.partition("=")[::2] for item in (process / "environ").read_text().split("\0"))
            program = (process / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if environment.get("SLURM_JOB_ID") == job.number and program.startswith("python3\0"):
            found.setdefault(int(environment.get("SLURM_PROCID", "0")), int(process.name))
    return [found[rank] for rank in sorted(found)]


def leftovers(job: Job) -> list[Path]:
    return [*Path("/tmp").glob(f"nextscale-{job.number}.*"), *(job.home.folder / job.run).glob(".slurm-*")]


@pytest.fixture(scope="module")
def whole(cluster: SlurmCluster, home: Project) -> Job:
    job = Job(cluster, home, "runs/whole")
    assert job.wait_for_state(*ENDED) == "COMPLETED", job.log[-3000:]
    return job


def test_a_job_that_is_left_alone_trains_on_both_nodes_to_the_end(whole: Job) -> None:
    assert whole.told("ExitCode") == "0:0" and whole.told("Restarts") == "0"
    assert whole.told("NodeList") == "node[1-2]"
    assert [record["step"] for record in curve(whole.home, whole.run) if record["kind"] == "train"][-1] == NUM_STEPS
    assert is_whole(whole.checkpoints()[-1])
    assert not leftovers(whole)


def test_a_job_near_its_time_limit_saves_is_requeued_and_ends_as_if_nothing_had_happened(
    whole: Job, cluster: SlurmCluster, home: Project
) -> None:
    run = "runs/requeued"
    job = Job(cluster, home, run, "--time=60")
    job.wait_for_steps(3)
    job.let_the_time_limit_come_near()
    assert job.wait_for_state("PENDING", *ENDED, seconds=300) == "PENDING", job.log[-3000:]

    stopped_at = job.checkpoints()[-1]
    assert is_whole(stopped_at) and 3 <= int(stopped_at.name.removeprefix("step-")) < NUM_STEPS
    assert History(home.folder / run).events(STOP)[0]["reason"].startswith("SIGUSR1 on rank")
    assert f"job {job.number} is requeued" in job.log
    time.sleep(3)  # Slurm refuses what starts anew in the second in which it was killed
    job.update("TimeLimit=60", "StartTime=now")  # Slurm would wait for two minutes

    assert job.wait_for_state(*ENDED) == "COMPLETED", job.log[-3000:]
    assert job.told("Restarts") == "1" and job.told("ExitCode") == "0:0"
    assert "resuming from" in job.log
    assert curve(home, run) == curve(home, whole.run)
    assert not leftovers(job)


def test_a_job_that_is_cancelled_leaves_its_last_step_saved(cluster: SlurmCluster, home: Project) -> None:
    job = Job(cluster, home, "runs/cancelled")
    job.wait_for_steps(3)
    cluster.ask("scancel", job.number)
    wait_until(lambda: not processes_of(job), "no rank is left", seconds=40)
    assert job.wait_for_state(*ENDED) == "CANCELLED"
    assert is_whole(job.checkpoints()[-1]), "saved before KillWait was over"
    assert "is requeued" not in job.log and job.told("Restarts") == "0"
    wait_until(lambda: not leftovers(job), "the temporary folders are gone", seconds=10)


def test_a_job_whose_user_makes_the_stop_file_stays_stopped(cluster: SlurmCluster, home: Project) -> None:
    job = Job(cluster, home, "runs/stopped")
    job.wait_for_steps(3)
    (home.folder / job.run / "stop").touch()
    assert job.wait_for_state("PENDING", *ENDED, seconds=120) == "FAILED"
    assert job.told("ExitCode") == "75:0" and job.told("Restarts") == "0"
    assert is_whole(job.checkpoints()[-1]) and not leftovers(job)


def test_a_rank_that_dies_takes_its_job_down_in_seconds(cluster: SlurmCluster, home: Project) -> None:
    job = Job(cluster, home, "runs/killed")
    job.wait_for_steps(1)
    ranks = processes_of(job)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not processes_of(job), "no rank is left", seconds=10)
    assert job.wait_for_state(*ENDED, seconds=20) == "FAILED"
    assert job.told("ExitCode") == "137:0" and job.told("Restarts") == "0"
    assert time.monotonic() - killed < 20
    assert not leftovers(job)


def test_srun_alone_is_enough_on_one_node(cluster: SlurmCluster, home: Project) -> None:
    command = ["srun", "--nodes=1", "--ntasks=2", sys.executable, "launchers/train.py", "--config"]
    run = ["configs/digits/d4.yaml", "run=runs/srun", *SHORT, "loop.stop_after_steps=2"]
    cluster.ask(*command, *run, folder=home.folder, seconds=300)
    assert torch.tensor([record["step"] for record in home.records("runs/srun")]).max() == 2


def test_nodes_that_cannot_be_found_by_name_are_said_in_one_line(cluster: SlurmCluster, home: Project) -> None:
    command = ["srun", "--nodes=2", "--ntasks=2", sys.executable, "launchers/train.py", "--config"]
    with pytest.raises(RuntimeError, match="error: node1, the first node of node.1-2., has no address here") as said:
        cluster.ask(*command, "configs/digits/d4.yaml", "run=runs/nowhere", *SHORT, folder=home.folder, seconds=300)
    assert "Traceback" not in str(said.value)
