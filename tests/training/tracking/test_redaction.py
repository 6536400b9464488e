"""Passwords and tokens are hidden, ordinary text is not, and a setting that holds one is recognised."""

from __future__ import annotations

import io
import logging
import sys
import time
import traceback
import warnings

import pytest
from secret_texts import NAMED, SECRETS, visible

from training.tracking.redaction import redact, redacted_output, secret_in, secret_values

ORDINARY = [
    "tokenizer=runs/tokenizer is missing; write tokenizer=PATH",
    "tokens_per_second: 680, num_tokens=680",
    "see https://host.example:8080/path#/runs?compareRunsMode=CHART",
    "sqlite:///runs/mlflow.db and http://127.0.0.1:5000/#/experiments/1/runs/2",
    "postgresql://anna@db.example:5432/mlflow",
    "s3://bucket/key@2x.png",
    "rank 3: no progress for 60 s while: forward pass: block 3",
    "step-00000001.bin is damaged (sha256 0123456789abcdef0123456789abcdef)",
    "the basic functions of a task-specific tokenizer, disk-0123456789",
    "sk-learn-digits-with-a-long-name",
    "a passing test; bypass=1; compass: north",
]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_recognised_by_its_form_and_hidden(name: str) -> None:
    said = f"cannot reach {SECRETS[name]} (timeout); try again"
    assert visible(said) and not visible(redact(said, {}))
    assert redact(said, {}).startswith("cannot reach ") and redact(said, {}).endswith("; try again")
    assert secret_in(SECRETS[name])
    assert redact(redact(said, {}), {}) == redact(said, {})


@pytest.mark.parametrize("text", NAMED)
def test_what_is_named_as_a_secret_is_hidden(text: str) -> None:
    assert not visible(redact(text, {})) and "***" in redact(text, {})
    assert secret_in(text)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text, {}) == text and not secret_in(text)


def test_the_rest_of_a_url_can_still_be_read() -> None:
    assert redact("http://anna:Kanarie1@mlflow.example:5000/x", {}) == "http://***@mlflow.example:5000/x"
    assert redact("https://b/k?X-Amz-Signature=Kanarie1&a=1#top", {}) == "https://b/k?***#top"
    assert redact("b/k?X-Amz-Signature=Kanarie1&a=1", {}) == "b/k?X-Amz-Signature=***&a=1"


def test_values_of_secret_variables_are_hidden_whatever_they_look_like() -> None:
    environment = {"MLFLOW_TRACKING_PASSWORD": "just some words", "WANDB_API_KEY": "0a1b2c3d4e", "HOME": "/home/anna"}
    said = redact("sent just some words with 0a1b2c3d4e from /home/anna", environment)
    assert said == "sent *** with *** from /home/anna"


def test_only_variables_that_are_named_so_are_secret() -> None:
    harmless = {"PWD": "/home/anna", "OLDPWD": "/home/anna/x", "TOKENIZERS_PARALLELISM": "parallel", "PATH": "/usr/bin"}
    assert secret_values(harmless | {"DB_PASS": "short", "X_TOKEN": "long enough"}) == ["long enough"]


def test_long_texts_take_no_time() -> None:
    pieces = ("a.", "a_", "a://", "a://b:", "sk-a-", "eyJaaaaaaaaa.", "bearer ", "=", "?sig", "x")
    for piece in (*SECRETS.values(), *NAMED, *pieces):
        start = time.process_time()
        redact(piece * (50_000 // len(piece)), {})
        assert time.process_time() - start < 2, piece


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
