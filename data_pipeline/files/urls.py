"""Which texts are URLs, which URLs are accepted, and what of a URL may be shown.

Whatever begins like `scheme:` is a URL, so that no `pipe:` or `file:` passes as a path. A local file whose name begins
like that is given with a path before it: ./a:b or /data/a:b.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

SCHEMES = ("http", "https", "s3")
MAX_URL = 8000  # characters; servers take no longer ones
MAX_SHOWN = 300

_SCHEME = re.compile(r"[\x00-\x20]*([A-Za-z][A-Za-z0-9+.-]*):")
_ADDRESS = re.compile(r"\[[0-9A-Fa-f:.]*\]?")  # of IPv6, the one place for two colons in a row
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]*)?")


def is_url(text: str) -> bool:
    """Tell whether a text is meant as a URL, accepted or not. What begins with / or . is a local path."""
    if text.startswith(("/", ".")):
        return False
    return _SCHEME.match(text) is not None or "://" in text or "::" in text


def check_location(text: str) -> None:
    """Raise ValueError for a URL that is not accepted: another scheme, a chain of them, a password, no host."""
    if is_url(text) and (fault := _fault(text)):
        raise ValueError(f"{without_query(text)!r}: {fault}")


def without_query(url: str) -> str:
    """Reduce a location to what messages and logs may show: no query, no user, nothing unprintable."""
    if not is_url(url):
        return url
    scheme, _, rest = "".join(character if character.isprintable() else "?" for character in url).partition(":")
    if scheme.lower() not in SCHEMES or not rest.startswith("//"):
        return f"{scheme.strip()[:20]}:..."  # a command, or what nobody can tell the secrets from
    authority, slash, path = re.split(r"[?#]", rest[2:], maxsplit=1)[0].partition("/")
    host = authority.rpartition("@")[2]
    if "@" in url and not _HOST_AND_PORT.fullmatch(host):
        return f"{scheme}://..."  # a password with / or ? in it looks like a port and a path
    shown = f"{scheme}://{host}{slash}{path}"
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."


def _fault(url: str) -> str:
    """Say what is wrong with a URL; nothing: it is accepted."""
    if len(url) > MAX_URL:
        return f"{len(url)} characters, a URL has at most {MAX_URL}; shorten it"
    if "::" in _ADDRESS.sub("", url.partition("?")[0]):
        return "chains URLs by '::', which is not accepted; give the URL of the files themselves"
    scheme = _SCHEME.match(url)
    if scheme is None or scheme[1].lower() not in SCHEMES:
        name = scheme[1] if scheme else ""
        return f"scheme {name!r} is not accepted, only {', '.join(SCHEMES)}; a local path with a colon is written ./a:b"
    if any(not character.isprintable() or character in " \\" for character in url):
        return "holds a space, a backslash or a control character; write %20 or the like"
    return _address_fault(url, scheme[1].lower())


def _address_fault(url: str, scheme: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "has a malformed host or port; write scheme://host:port/path"
    if "@" in parts.netloc:
        place = "the usual AWS places (AWS_ variables, ~/.aws)" if scheme == "s3" else "~/.netrc"
        return f"holds a user or password; remove it and put it into {place}"
    if not host:
        return f"names no host; write {scheme}://{'bucket' if scheme == 's3' else 'host'}/path"
    if "#" in url:
        return "holds a '#'; write %23 in its place, or remove it"
    if scheme == "s3" and ("?" in url or parts.port is not None):
        return "holds a '?' or a port; write s3://bucket/path, and the server in AWS_ENDPOINT_URL_S3"
    return ""
