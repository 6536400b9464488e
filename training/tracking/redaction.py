"""Passwords and tokens, which must not be printed and which no setting may hold.

A secret is known by its form (a URL with a password or a query, the tokens of well-known services), by the name before
a "=" or a colon, or as the value of an environment variable whose name says that it is secret. One rule serves both:
what is hidden in prints is refused in settings.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

HIDDEN = "***"
MIN_CHARACTERS = 8  # shorter values of variables also occur by chance
REMEDY = (
    "take it out: MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials, "
    "S3 reads ~/.aws/credentials, http(s) ~/.netrc, PostgreSQL ~/.pgpass"
)

# What it is -> how it looks. Only the group `secret` is hidden, where there is one. Bounded repetitions bound the time.
FORMS = {
    "a password in a URL": r"\b[a-zA-Z][\w+.-]{0,20}://(?P<secret>[^\s'\"/?#@:]{0,200}:[^\s'\"]{0,1000})@",
    "a user or token in a URL": r"\bhttps?://(?P<secret>[^\s'\"/?#@]{1,1000})@",
    "a query in a URL": r"\b[a-zA-Z][\w+.-]{0,20}://[^\s'\"?#]{0,1000}\?(?P<secret>[^\s'\"#]+)",  # it may be signed
    "a signed address": (
        r"(?i:[?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|signature|sig"
        r"|(?:access_|auth_|id_|refresh_)?token|(?:api_?)?key|password|pwd|secret|auth|sas|jwt)=)"
        r"(?P<secret>[^\s&'\"#]+)"
    ),
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,})",
    "a GitLab token": r"\bglpat-[\w-]{16,}",
    "an API key": r"\b(?:sk-(?:[a-z0-9]{1,10}-){0,3}[A-Za-z0-9_]{20,}|AIza[\w-]{30,}|dapi[0-9a-f]{32})",
    "an npm token": r"\bnpm_[A-Za-z0-9]{16,}",
    "a PyPI token": r"\bpypi-[\w-]{16,}",
    "a Slack token": r"\bxox[abprs]-[\w-]{10,}",
    "a JSON web token": r"\beyJ[\w-]{8,2000}\.[\w-]{8,4000}\.[\w-]*",
    "a private key": r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----(?:[^-]{0,9999}-----END [A-Z ]{0,20}PRIVATE KEY-----)?",
    "an authorization": (
        r"(?i:authorization['\"]?\s{0,9}[:=]\s{0,9}['\"]?(?:basic|token|bearer)\s{1,9}"
        r"|\bbearer\s{1,9}(?=[^\s\d]{0,99}\d))(?P<secret>[A-Za-z0-9+/=._~-]{8,})"
    ),
}
_IS = r"['\"]?\s{0,9}[=:]\s{0,9}['\"]?"
NAMED = re.compile(  # password=..., "api_key": "...", AWS_SECRET_ACCESS_KEY=...; "pass:" and "token:" are also English
    r"(?i)(?<![a-z])((?:"
    r"(?:[\w.-]{0,40}[_.-])?(?:passw(?:or)?d|passphrase|pwd|secret|credentials?"
    rf"|(?:api|access|secret|private)_?key(?:_?id)?){_IS}"
    rf"|[\w.-]{{0,40}}[_.-](?:pass|token){_IS}"
    r"|(?:pass|token)(?:=|['\"]\s{0,9}[=:]\s{0,9})['\"]?))"
    r"(?![\s=:'\"]|\*\*\*)[^\s'\",;&)}\]]+"
)
SECRET_NAME = re.compile(
    r"(?i)PASSW(?:OR)?D|PASSPHRASE|SECRET|CREDENTIAL|TOKEN(?:$|_)|(?:^|_)(?:PASS|PWD)(?:$|_)"
    r"|(?:API|ACCESS|PRIVATE)_?KEY"
)
NO_SECRET = ("PWD", "OLDPWD")  # the shell's folders
_PATTERNS = {name: re.compile(pattern) for name, pattern in FORMS.items()}


def secret_in(text: str) -> str:
    """Name the kind of secret that a text seems to hold; empty if it holds none."""
    if found := next((name for name, pattern in _PATTERNS.items() if pattern.search(text)), ""):
        return found
    return "a value that is named as a secret" if NAMED.search(text) else ""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Replace what looks like a secret, or is one of the environment, by three stars."""
    return _redacted(text, secret_values(environment))


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the values of the variables whose names say that they are secret, the longest first."""
    names = (name for name in environment if SECRET_NAME.search(name) and name not in NO_SECRET)
    values = {environment[name] for name in names}
    return sorted((value for value in values if len(value) >= MIN_CHARACTERS), key=len, reverse=True)


def _redacted(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, HIDDEN)
    for pattern in _PATTERNS.values():
        text = pattern.sub(_hide, text)
    return NAMED.sub(rf"\1{HIDDEN}", text)


def _hide(match: re.Match[str]) -> str:
    secret = match.groupdict().get("secret")
    return HIDDEN if secret is None else match[0].replace(secret, HIDDEN)


class RedactingStream:
    """The text stream that hides secrets in what is written to it, and is its `stream` in all else.

    A stream that can no longer be written, a pipe without a reader or a log on a full disk, is silent from then on:
    nobody's work ends for want of somebody to tell of it. `lost` then says why.
    """

    def __init__(self, stream: TextIO, values: list[str]) -> None:
        self._stream = stream
        self._values = values
        self.lost = ""

    def write(self, text: str) -> int:
        with self._outliving():
            self._stream.write(_redacted(text, self._values))
        return len(text)

    def flush(self) -> None:
        with self._outliving():
            self._stream.flush()

    @contextmanager
    def _outliving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error.strerror or str(error)
            with suppress(OSError, ValueError):  # what is still buffered goes nowhere too, instead of failing again
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def writelines(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lost_output() -> str:
    """Say which of this process's standard streams can no longer be written, and why; empty if both can."""
    streams = {"standard output": sys.stdout, "standard error": sys.stderr}
    lost = {name: getattr(stream, "lost", "") for name, stream in streams.items()}
    return "; ".join(f"{name}: {why}" for name, why in lost.items() if why)


@contextmanager
def redacted_output(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Hide secrets in all that this process writes to its standard streams, also in warnings and tracebacks."""
    values = secret_values(environment)
    out, error = RedactingStream(sys.stdout, values), RedactingStream(sys.stderr, values)
    with redirect_stdout(out), redirect_stderr(error):
        yield
