"""A client of MLflow, and the questions that every user of one asks. What MLflow raises comes out."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from training import seams
from training.tracking.record import SQLITE, artifact_folder, database_file
from training.tracking.redaction import redact

STUDY_TAG, ROLE_TAG = "study", "role"  # of a study's runs: the study's name, and what the run is in it
OF_STUDY, OF_TRAINING = "study", "train"  # roles
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow shows runs as children
COMMIT_TAG = "mlflow.source.git.commit"
DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def open_client(uri: str) -> Any:
    """A client of the tracker; a database file that is not there is made."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    file = database_file(uri)
    if file is not None and not file.exists():
        _make_database(file, MlflowClient)
    return MlflowClient(tracking_uri=uri)


def _make_database(file: Path, make_client: Callable[..., Any]) -> None:
    """A new database appears whole: MLflow takes seconds for its tables, and one cut short never works again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=".mlflow-", ignore_cleanup_errors=True) as folder:
        draft = Path(folder) / file.name
        make_client(tracking_uri=f"{SQLITE}{draft}").search_experiments(max_results=1)
        seams.reach("mlflow.database", draft)
        try:
            os.link(draft, file)
        except FileExistsError:
            pass  # another run was first
        except OSError:
            os.rename(draft, file)  # a file system without links


def code_version() -> str | None:
    """The commit of this code, with "-dirty" where files differ from it; None where it is no checkout."""
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *DESCRIBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def reason(error: Exception) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:120]}"


def open_experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment, which is made if it is not there."""
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name, artifact_location=artifact_folder(uri))


def active_run(client: Any, run_id: str | None) -> Any:
    """The run, None if the tracker does not have it or has deleted it."""
    run = run_or_none(client, run_id) if run_id else None
    return run if run is not None and run.info.lifecycle_stage == "active" else None


def find_run(client: Any, experiment_id: str, tags: dict[str, str]) -> Any:
    """A run with these tags; None where there is none."""
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return next(iter(client.search_runs([experiment_id], wanted, max_results=1)), None)


def set_tags(client: Any, run: Any, tags: dict[str, str]) -> None:
    """Set those that the run does not have."""
    for name, value in tags.items():
        if run.data.tags.get(name) != value:
            client.set_tag(run.info.run_id, name, value)


def set_status(client: Any, run_id: str, status: str) -> None:
    """RUNNING, FINISHED, FAILED or KILLED."""
    if status == "RUNNING":
        client.update_run(run_id, status=status)
    else:
        client.set_terminated(run_id, status)


def study_tags(study: str, role: str) -> dict[str, str]:
    """What tells the runs of a study from others, and in it the study's own from those of training."""
    return {STUDY_TAG: study, ROLE_TAG: role}


def run_or_none(client: Any, run_id: str) -> Any:
    """The run, None if the tracker does not have it; a tracker that cannot be asked raises."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
