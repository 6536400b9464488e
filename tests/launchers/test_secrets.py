"""Secrets of the environment, and of URLs that somebody gives, are in nothing that a run prints or leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from secret_texts import NAMED, SECRETS, visible
from tiny import Study, train_var
from trackers import FakeMLflow, connect, page_of, record_of, train_record

import launchers.setup.config_files as config_files
from launchers import train
from launchers.setup.command_line import Command, run_launcher
from launchers.setup.running import supervise
from launchers.setup.settings import TrainConfig
from launchers.sync_mlflow import SyncConfig
from training.engine.distributed import World
from training.tracking.follow import follow
from training.tracking.mlflow import TrackerUnavailable, log_picture, update_state

VARIABLES = [
    *("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
    *("AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "WANDB_API_KEY", "DB_PASSWORD"),
    *("OPENAI_API_KEY", "GOOGLE_API_KEY", "SLACK_TOKEN", "PGPASSWORD", "CI_JOB_TOKEN", "MY_SECRET", "SSH_PASSPHRASE"),
    *("REGISTRY_CREDENTIALS", "TLS_PRIVATE_KEY", "DATABRICKS_TOKEN"),
]
CANARIES = {name: f"Kanarie1-{number:02d}-of-the-environment" for number, name in enumerate(VARIABLES)}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NEXTSCALE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def leave(
    monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None], *arguments: str, schema: type = SyncConfig
) -> Any:
    """Run a launcher to its end; the exit code, or the error of the program that Python would show."""
    monkeypatch.setattr(sys, "argv", ["launcher.py", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    try:
        run_launcher(schema, launch, "a launcher")
    except SystemExit as left:
        return left.code
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def files_with_a_canary(folder: Path) -> list[str]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and b"Kanarie" in path.read_bytes():
            found.append(str(path.relative_to(folder)))
    return found


def test_a_run_leaves_no_secret_in_any_file_output_or_argument(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    popen = subprocess.Popen

    def start(command: Any, **options: Any) -> Any:
        started.append(command)
        if "training.tracking.follow" in command:
            raise OSError(f"cannot reach http://anna:{CANARIES['DB_PASSWORD']}@mlflow.example")
        return popen(command, **options)

    def launch(command: Command[TrainConfig]) -> None:
        with supervise(Path(command.config.run), command.config.watch, World()):
            train_var(command.config)

    monkeypatch.setattr(subprocess, "Popen", start)
    config = study.train_config("secrets", stop_after_steps=1)
    (tmp_path / "a.yaml").write_text(config_files.to_yaml(config))
    arguments = ["--config", str(tmp_path / "a.yaml"), "tracking.mlflow=true", "tracking.uri=http://mlflow.example"]
    assert leave(monkeypatch, launch, *arguments, schema=TrainConfig) == 0
    run = Path(config.run)
    assert {"config.yaml", "history.jsonl", "metrics.jsonl"} <= {path.name for path in run.iterdir()}
    assert list(run.glob("checkpoints/step-*/manifest.json"))
    assert files_with_a_canary(run) == []
    said = "".join(capfd.readouterr())
    assert "http://***@mlflow.example" in said and not visible(said)
    assert any("training.tracking.follow" in command for command in started) and not visible(json.dumps(started))


@pytest.mark.parametrize(("kind", "code"), [(ValueError, 64), (KeyError, 1)])
def test_errors_and_tracebacks_show_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception], code: int
) -> None:
    """The forms that are recognised are listed in full by test_redaction."""
    monkeypatch.setenv("NEXTSCALE_TRACEBACK", "1")
    for secret in (SECRETS["a password in a URL"], NAMED[0], *CANARIES.values()):

        def fail(command: Command[SyncConfig], secret: str = secret) -> None:
            print(f"about to send {secret}")
            raise kind(f"cannot send {secret}")

        assert leave(monkeypatch, fail, "run=r") == code
        said = "".join(capsys.readouterr())
        assert "Traceback" in said and "cannot send" in said and not visible(said), secret


def test_a_setting_that_holds_a_secret_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for secret in SECRETS.values():
        for arguments in (
            ["run=r", f"uri={secret}"],
            ["run=r", f"uri={json.dumps(secret)}"],
            [secret],
            [f"{secret}=1"],
        ):
            assert leave(monkeypatch, lambda command: pytest.fail("launched"), *arguments) == 64
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and not visible(said), said
            assert " holds a" in said and "MLFLOW_TRACKING_PASSWORD" in said and "~/.aws" in said


def test_what_trackers_say_and_are_told_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings of a run that an earlier version wrote may hold one; errors of a tracker name the URL."""
    url = SECRETS["a password in a URL"]
    record_of(tmp_path, train_record(1))
    client = connect(FakeMLflow(), monkeypatch)
    page = page_of(tmp_path, **{"tracking.uri": url, "token": SECRETS["a Hugging Face token"]})
    page.catch_up("RUNNING")
    assert client.active()[0].data.params and not visible(repr(client.active()))

    def fail(*arguments: Any) -> Any:
        raise ConnectionError(f"{'x' * 90} {url} with {CANARIES['MLFLOW_TRACKING_TOKEN']}")

    client.fail = fail
    record_of(tmp_path, train_record(2))
    with pytest.raises(TrackerUnavailable) as caught:
        follow(page, Mock(side_effect=["RUNNING", *["FINISHED"] * 3]), print)
    update_state(tmp_path, uri=url, run_id="1")
    monkeypatch.setattr("training.tracking.mlflow.open_client", fail)
    log_picture(tmp_path, tmp_path / "a.png", url)
    said = "".join(capsys.readouterr())
    assert said.count("mlflow: ") == 2 and not visible(said + str(caught.value))


def test_job_scripts_name_no_secret_and_print_no_environment() -> None:
    for path in (Path(train.__file__).parent / "slurm").iterdir():
        words = {word.strip("()$;|&") for word in path.read_text().split()}
        assert not words & {"env", "printenv"} and "export -p" not in path.read_text(), path.name
        assert "--export" not in path.read_text()  # Slurm's own way: the environment is never part of a command line
        assert not any(name in path.read_text() for name in VARIABLES)
