"""Which texts are URLs, which are accepted, and what may be shown of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.files.urls import MAX_URL, check_location, is_url, without_query

SIGNED = "https://host/data?X-Amz-Signature=CANARY"
ACCEPTED = (
    "http://host/data",
    "https://host:8443/a/b?signature=x%2Fy",
    "HTTP://Host/data",
    "http://[::1]:8080/data",
    "http://10.0.0.1/a@b",
    "s3://bucket/data",
    "s3://bucket",
)
REFUSED = {
    "pipe:cat x": "pipe",
    " pipe:cat x": "pipe",
    "PIPE:cat": "PIPE",
    "file:///etc/passwd": "'file' is not accepted",
    "gs://bucket/a": "'gs' is not accepted",
    "ftp://host/a": "'ftp' is not accepted",
    "data:,x": "'data' is not accepted",
    "simplecache::http://host/a": "chains URLs",
    "http://host/a::s3://bucket/b": "chains URLs",
    "a:b/c": "a local path with a colon is written ./a:b",
    "://host/a": "'' is not accepted",
    "http:/x": "names no host",
    "http://": "names no host",
    "http:///x": "names no host",
    "s3:///key": "names no host; write s3://bucket/path",
    "http://host:99999/x": "malformed host or port",
    "http://[::1/x": "malformed host or port",
    "http://host/a b": "holds a space",
    "http://host/a\nb": "control character",
    "http://host/a\tb": "control character",
    "http://host\\@other/": "holds a space, a backslash",
    "http://me:CANARY@host/a": "put it into ~/.netrc",
    "s3://key:CANARY@bucket/a": "AWS_ variables",
    "http://host/a#b": "holds a '#'",
    "s3://bucket/a?versionId=1": r"holds a '\?'",
    "s3://bucket:9000/a": "or a port",
    "http://host/" + "a" * MAX_URL: f"at most {MAX_URL}",
}


@pytest.mark.parametrize("url", ACCEPTED)
def test_web_and_s3_addresses_are_accepted(url: str) -> None:
    assert is_url(url)
    check_location(url)


@pytest.mark.parametrize("path", ["/data/a:b", "./a:b", "../x::y", "data/imagenet", "a b/c", "", "data/a:b", "~/x"])
def test_local_paths_are_no_urls(path: str) -> None:
    assert not is_url(path) and without_query(path) == path
    check_location(path)


@pytest.mark.parametrize("url", REFUSED)
def test_everything_else_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[url]) as caught:
        check_location(url)
    assert "\n" not in str(caught.value) and "CANARY" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    assert without_query(SIGNED) == "https://host/data"
    assert without_query("http://me:CANARY@host/a#CANARY") == "http://host/a"
    assert without_query("https://host:1/data@v2/a") == "https://host:1/data@v2/a"
    for text in ("http://me:CAN/ARY@host/a", "http://me:CAN?ARY@host/a", "pipe:curl -H CANARY", "x::CANARY"):
        assert "CAN" not in without_query(text)


@settings(max_examples=200)
@given(st.text(max_size=30), st.sampled_from(["pipe:", "file:", "http://", "a::", "s3://", ""]))
def test_a_text_is_refused_or_has_an_accepted_scheme(text: str, start: str) -> None:
    url = start + text
    try:
        check_location(url)
    except ValueError as error:
        assert str(error).isprintable()
    else:
        assert not is_url(url) or url.lower().startswith(("http://", "https://", "s3://"))
