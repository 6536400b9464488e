"""A study on a real Slurm of two emulated nodes: `run --slurm`, once; `make test-slurm`, a minute or two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, running_cluster, wait_until, why_not
from tiny import Study, command

from data_pipeline.files.strict_json import read_json
from launchers.setup.config_files import to_yaml
from launchers.study.config import StudyConfig
from launchers.study.run import launch_run
from launchers.study.state import Follower, is_done, plan_runs
from training.tracking.record import TrackingConfig

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(why_not()), reason=why_not() or "Slurm is here")]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """A cluster that this process submits to."""
    with running_cluster(tmp_path / "slurm") as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        yield cluster


@pytest.fixture
def config(study: Study, tmp_path: Path) -> StudyConfig:
    base = study.train_config()
    for depth in (1, 2):
        (tmp_path / f"d{depth}.yaml").write_text(to_yaml(replace(base, model=replace(base.model, depth=depth))))
    return StudyConfig(
        folder=str(tmp_path / "study"),
        sizes=(str(tmp_path / "d1.yaml"), str(tmp_path / "d2.yaml")),
        slurm=True,
        sbatch=("--time=50", "d2: --time=40"),
        tracking=TrackingConfig(mlflow=False),
    )


def jobs_of(config: StudyConfig) -> list[str]:
    return list(map(str, read_json(Path(config.folder) / "slurm" / "jobs.json")))


def wait_for_end(cluster: SlurmCluster) -> None:
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), "no job is in the queue", seconds=600)


def test_a_study_is_trained_by_slurm_and_then_fitted(cluster: SlurmCluster, config: StudyConfig) -> None:
    launch_run(command(config))
    first, second, fit = jobs_of(config)
    with pytest.raises(ValueError, match=f"in the queue: {first}, {second}, {fit}"):
        launch_run(command(config))
    limits = [cluster.job(job)["TimeLimit"] for job in (first, second)]
    assert limits == ["00:50:00", "00:40:00"], "what is said of a size comes after what is said of all"
    wait_for_end(cluster)
    logs = {path.name: path.read_text() for path in (Path(config.folder) / "slurm").glob("*.log")}
    for run in plan_runs(config):
        assert is_done(run, Follower(run).look()), logs
    times = [cluster.job(job) for job in (first, second, fit)]
    assert times[2]["StartTime"] >= max(job["EndTime"] for job in times[:2])
    assert sorted(logs) == [f"study-{first}_0.log", f"study-{second}_0.log", f"study-fit-{fit}.log"]
    assert "sizes" in logs[f"study-fit-{fit}.log"], "two are too few for a law, and that is said"
    launch_run(command(config))
    assert jobs_of(config) == [first, second, fit], "nothing is left to submit"


def test_a_run_that_cannot_be_trained_takes_the_fit_with_it(cluster: SlurmCluster, config: StudyConfig) -> None:
    launch_run(command(replace(config, settings=("data.train=nowhere", "data.validation=nowhere"))))
    wait_for_end(cluster)
    states = [cluster.job(job)["JobState"] for job in jobs_of(config)]
    assert states == ["FAILED", "FAILED", "CANCELLED"]
