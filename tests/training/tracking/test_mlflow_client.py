"""What every user of MLflow asks of it, and a database that is made whole."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trackers import FakeMLflow, Killed

from training import seams
from training.tracking.mlflow_client import (
    OF_STUDY,
    OF_TRAINING,
    active_run,
    code_version,
    find_run,
    open_client,
    open_experiment,
    reason,
    set_status,
    set_tags,
    study_tags,
)


@pytest.fixture
def client() -> FakeMLflow:
    return FakeMLflow()


@pytest.fixture
def no_fault_left() -> Iterator[None]:
    yield
    seams.install(None)


def test_an_experiment_is_made_once(client: FakeMLflow) -> None:
    assert open_experiment(client, "sizes", "http://host") == open_experiment(client, "sizes", "http://host")
    assert client.calls.count("create_experiment") == 1


def test_a_run_that_is_unknown_or_deleted_is_none(client: FakeMLflow) -> None:
    run = client.create_run("7", run_name="a", tags={})
    assert active_run(client, run.info.run_id) is run
    client.delete_run(run.info.run_id)
    assert active_run(client, run.info.run_id) is active_run(client, "f" * 32) is active_run(client, None) is None


def test_a_tracker_that_cannot_be_asked_is_no_absent_run(client: FakeMLflow) -> None:
    client.fail = lambda call: "refused"
    with pytest.raises(ConnectionError):
        active_run(client, "f" * 32)


def test_a_run_is_found_by_all_of_its_tags(client: FakeMLflow) -> None:
    client.create_run("7", run_name="child", tags=study_tags("sizes", OF_TRAINING))
    parent = client.create_run("7", run_name="parent", tags=study_tags("sizes", OF_STUDY))
    assert find_run(client, "7", study_tags("sizes", OF_STUDY)) is parent
    assert find_run(client, "7", study_tags("other", OF_STUDY)) is None


def test_only_tags_that_differ_are_set(client: FakeMLflow) -> None:
    run = client.create_run("7", run_name="a", tags={"depth": "6"})
    set_tags(client, run, {"depth": "6", "seed": "0"})
    assert run.data.tags == {"depth": "6", "seed": "0"} and client.calls.count("set_tag") == 1


@pytest.mark.parametrize("status", ["RUNNING", "FINISHED", "FAILED", "KILLED"])
def test_a_run_has_the_status_that_is_set(client: FakeMLflow, status: str) -> None:
    run = client.create_run("7", run_name="a", tags={})
    set_status(client, run.info.run_id, status)
    assert run.info.status == status


def test_the_version_of_the_code_is_a_commit_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch("[0-9a-f]{40,64}(-dirty)?", code_version() or "0" * 40)

    def no_git(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert code_version() is None


def test_a_reason_is_one_short_line_without_secrets() -> None:
    said = reason(ConnectionError("http://user:secret@host\n" + "refused " * 99))
    assert said.startswith("ConnectionError: ") and len(said) < 150 and "\n" not in said and "secret" not in said


def test_a_database_is_there_whole_or_not_at_all(tmp_path: Path, no_fault_left: None) -> None:
    """Killed while MLflow makes its tables; and two runs that make the same one at once."""

    def kill(site: str, value: Any) -> Any:
        raise Killed

    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    seams.install(kill)
    with pytest.raises(Killed):
        open_client(uri)
    assert not file.exists()
    seams.install(lambda site, draft: shutil.copy(draft, file))
    assert open_client(uri).search_experiments()[0].name == "Default"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
