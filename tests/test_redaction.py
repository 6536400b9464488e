"""Passwords and tokens are hidden, ordinary text is not, and a setting that holds one is recognised."""

from __future__ import annotations

import io
import logging
import sys
import time
import traceback
import warnings

import pytest

from training.redaction import redact, redacted_output, secret_in, secret_values

# made up, in the forms of the real ones
SECRETS = {
    "a password in a URL": "http://anna:Kanarie1@mlflow.example:5000/x",
    "a password with signs in a URL": "postgresql://anna:Kanarie1/x@y@db.example/mlflow",
    "a user or token in a URL": "https://Kanarie1@github.example/repo.git",
    "a signed S3 URL": "https://b.s3.example/k?X-Amz-Credential=Kanarie1&X-Amz-Signature=Kanarie1",
    "an old signed URL": "https://b.s3.example/k?AWSAccessKeyId=Kanarie1&Expires=1&Signature=Kanarie1",
    "a token in a query": "https://host.example/x?a=1&token=Kanarie1#top",
    "an AWS access key": "AKIA" + "KANARIE1KANARIE1",
    "a temporary AWS key": "ASIA" + "KANARIE1KANARIE1",
    "a Hugging Face token": "hf_" + "Kanarie1" * 4,
    "a GitHub token": "ghp_" + "Kanarie1" * 4,
    "a fine-grained GitHub token": "github_pat_" + "Kanarie1_" * 4,
    "a GitLab token": "glpat-" + "Kanarie1" * 3,
    "an OpenAI key": "sk-proj-" + "Kanarie1" * 4,
    "a Google key": "AIza" + "Kanarie1" * 4,
    "a Slack token": "xoxb-" + "Kanarie1-" * 2,
    "a Databricks token": "dapi" + "0123456789abcdef" * 2,
    "a JSON web token": "eyJKanarie1Kanarie1.eyJKanarie1Kanarie1.Kanarie1",
    "a bearer": "Authorization: Bearer Kanarie1Kanarie1",
    "a basic authorization": "'Authorization': 'Basic Kanarie1Kanarie1='",
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\nKanarie1\n-----END RSA PRIVATE KEY-----",
}
NAMED = [
    "password=Kanarie1",
    "AWS_SECRET_ACCESS_KEY=Kanarie1",
    "{'api_key': 'Kanarie1'}",
    '{"token": "Kanarie1"}',
    "secret: Kanarie1",
    "token=Kanarie1",
    "db.passwd = 'Kanarie1'",
    "auth_token: Kanarie1",
    "credentials=Kanarie1, more",
]
ORDINARY = [
    "tokenizer=runs/tokenizer is missing; write tokenizer=PATH",
    "tokens_per_second: 680, num_tokens=680",
    "see https://host.example:8080/path?user=1#top",
    "sqlite:///runs/mlflow.db and http://127.0.0.1:5000/#/experiments/1/runs/2",
    "postgresql://anna@db.example:5432/mlflow",
    "s3://bucket/key@2x.png",
    "rank 3: no progress for 60 s while: forward pass: block 3",
    "step-00000001.bin is damaged (sha256 0123456789abcdef0123456789abcdef)",
    "the basic functions of a task-specific tokenizer, disk-0123456789",
    "sk-learn-digits-with-a-long-name",
    "a passing test; bypass=1; compass: north",
]


def visible(text: str) -> bool:
    return any(part in text for part in ("anarie1", "ANARIE1", "0123456789abcdef0123"))


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_recognised_by_its_form_and_hidden(name: str) -> None:
    said = f"cannot reach {SECRETS[name]} (timeout); try again"
    assert visible(said) and not visible(redact(said, {}))
    assert redact(said, {}).startswith("cannot reach ") and redact(said, {}).endswith("; try again")
    assert secret_in(SECRETS[name])


@pytest.mark.parametrize("text", NAMED)
def test_what_is_named_as_a_secret_is_hidden(text: str) -> None:
    assert not visible(redact(text, {})) and "***" in redact(text, {})


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text, {}) == text and not secret_in(text)


def test_hiding_twice_changes_nothing() -> None:
    for text in (*SECRETS.values(), *NAMED):
        once = redact(text, {})
        assert redact(once, {}) == once


def test_the_rest_of_a_url_can_still_be_read() -> None:
    assert redact("http://anna:Kanarie1@mlflow.example:5000/x", {}) == "http://***@mlflow.example:5000/x"
    assert redact("https://b/k?X-Amz-Signature=Kanarie1&a=1", {}) == "https://b/k?X-Amz-Signature=***&a=1"


def test_values_of_secret_variables_are_hidden_whatever_they_look_like() -> None:
    environment = {"MLFLOW_TRACKING_PASSWORD": "just some words", "WANDB_API_KEY": "0a1b2c3d4e", "HOME": "/home/anna"}
    said = redact("sent just some words with 0a1b2c3d4e from /home/anna", environment)
    assert said == "sent *** with *** from /home/anna"


def test_only_variables_that_are_named_so_are_secret() -> None:
    harmless = {"PWD": "/home/anna", "OLDPWD": "/home/anna/x", "TOKENIZERS_PARALLELISM": "parallel", "PATH": "/usr/bin"}
    assert secret_values(harmless | {"DB_PASS": "short", "X_TOKEN": "long enough"}) == ["long enough"]


@pytest.mark.parametrize(
    "piece",
    [*SECRETS.values(), *NAMED, *("a.", "a_", "a://", "a://b:", "sk-a-", "eyJaaaaaaaaa.", "bearer ", "=", "?sig", "x")],
)
def test_long_texts_take_no_time(piece: str) -> None:
    start = time.monotonic()
    redact(piece * (50_000 // len(piece)), {})
    assert time.monotonic() - start < 2


def test_whatever_is_written_to_the_standard_streams_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    with redacted_output({"X_TOKEN": "some thing"}):
        print("password=Kanarie1", "some thing", flush=True)
        sys.stderr.writelines(["http://anna:Kanarie1@host\n"])
        sys.stderr.write(warnings.formatwarning("hf_" + "Kanarie1" * 3, UserWarning, "a.py", 1))
        logging.getLogger("a").warning("token=Kanarie1")
        try:
            raise ValueError("Authorization: Bearer Kanarie1Kanarie1")
        except ValueError:
            traceback.print_exc()
        assert sys.stdout.encoding and not sys.stdout.closed
    said = "".join(capsys.readouterr())
    assert "Traceback" in said and said.count("***") >= 5
    assert not visible(said) and "some thing" not in said
    assert not isinstance(sys.stdout, io.BytesIO) and "Redacting" not in type(sys.stdout).__name__
