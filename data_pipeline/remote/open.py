"""Reading whole files behind http(s) and s3 URLs. The door to fsspec, aiohttp and s3fs.

Files are read by fsspec's own calls. They lack four guarantees that are added here: what may pass is tried again, a
body is cut off where it grows too long, a server that sends next to nothing is given up, and an error is one line
without the secrets of a URL. An s3 URL is read by the http(s) URL that s3fs signs for it, so that all goes one way.
Nothing of those libraries is imported before the first request.
"""

from __future__ import annotations

import io
import os
import re
import socket
import string
import time
from collections.abc import Callable
from contextlib import suppress
from random import SystemRandom
from typing import Any, BinaryIO, ClassVar, TypeVar
from urllib.parse import quote

from data_pipeline.files.urls import without_query

MIN_BYTES = 64 * 2**10  # must arrive within the stall time: byte by byte, a server could keep us for years
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds between two tries: doubled each time, and up to half of it left out
SIGNATURE_SECONDS = 3600
TRY_LATER = (408, 425, 429)
CONTENT_RANGE = re.compile(r"bytes (?:\d{1,18}-\d{1,18}|\*)/(\d{1,18})")
S3_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or fill ~/.aws, or correct the path"
HTTP_CREDENTIALS = "put user and password of this host into ~/.netrc, renew a signed URL, or correct the path"

Result = TypeVar("Result")


class RemoteError(OSError):
    """A server did not deliver. The message names the URL without its query, what happened last, and what to do."""

    exit_code: ClassVar[int] = 69


class WrongSize(Exception):
    """The server has a file of another size than was expected. The text says which size."""


class _Fault(Exception):
    """A request that failed, in words without its URL."""

    def __init__(self, what: str, *, may_pass: bool = False) -> None:
        super().__init__(what)
        self.may_pass = may_pass


class _Absent(Exception):
    """The server has no such file."""


class RemoteFiles:
    """Reads whole files for many threads and processes at once."""

    def __init__(self, *, stall_seconds: float, retries: int) -> None:
        """Set how long a server may be silent, and how often a request is repeated after the first."""
        self.stall_seconds = stall_seconds
        self.retries = retries
        self._systems: dict[tuple[int, str], Any] = {}  # by process; those of a parent are kept, not used, after a fork

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_systems": {}}

    def size_of(self, url: str) -> int:
        """Return the bytes of a file. Raises FileNotFoundError, and RemoteError if the server does not say."""

        def ask() -> int:
            answer = _Answer(url, range_allowed=True)  # not HEAD: a signed URL is good for GET alone
            with suppress(WrongSize):  # the server ignores ranges, and was cut off
                self._get(url, io.BytesIO(), answer, at_most=1, headers={"Range": "bytes=0-0"})
            if answer.total is None:
                raise _Fault("the server does not say how large it is; it must send Content-Length")
            return answer.total

        return self._patiently(url, ask)

    def read_small(self, url: str, *, max_bytes: int) -> bytes:
        """Read a file into memory. Raises FileNotFoundError, RemoteError, and ValueError above `max_bytes`."""

        def read() -> bytes:
            content = io.BytesIO()
            self._get(url, content, _Answer(url), at_most=max_bytes)
            return content.getvalue()

        try:
            return self._patiently(url, read)
        except WrongSize:
            raise ValueError(f"{without_query(url)}: more than {max_bytes} bytes, and no more are accepted") from None

    def copy(self, url: str, file: BinaryIO, *, size: int) -> None:
        """Write a file of `size` bytes to the start of an open one. After an error it begins anew.

        Raises FileNotFoundError, RemoteError, and WrongSize if the server has another number of bytes.
        """

        def read() -> None:
            file.seek(0)
            answer = _Answer(url)
            self._get(url, file, answer, at_most=size)
            if file.tell() < size and answer.total is not None:
                raise WrongSize(f"{answer.total} bytes")
            if file.tell() < size:
                raise _Fault(f"it ended after {file.tell()} of {size} bytes", may_pass=True)

        self._patiently(url, read)

    def _patiently(self, url: str, attempt: Callable[[], Result]) -> Result:
        """Repeat an attempt until it succeeds, after longer and longer pauses, or will never pass."""
        place = without_query(url)
        for failures in range(1, self.retries + 2):
            try:
                return attempt()
            except _Absent:
                raise FileNotFoundError(f"{place}: no such file; copy or pack it again, or correct the URL") from None
            except _Fault as fault:
                if not fault.may_pass:
                    raise RemoteError(f"{place}: {fault}") from None
                last = str(fault)
            if failures <= self.retries:
                pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE)
                time.sleep(pause * SystemRandom().uniform(0.5, 1))  # the global generators belong to the training
        raise RemoteError(
            f"{place}: not delivered in {self.retries + 1} tries, at last: {last};"
            " look at the server and the network, then run the same command again"
        )

    def _get(self, url: str, sink: BinaryIO, answer: _Answer, *, at_most: int, **options: Any) -> None:
        """Write a body to `sink`. Raises WrongSize above `at_most` bytes, _Absent, _Fault, and what `sink` raises."""
        import aiohttp
        from fsspec.callbacks import Callback

        watch = Callback(hooks={"watch": _Watch(at_most, self.stall_seconds)})
        address = _encoded(self._signed(url) if _is_s3(url) else url)
        try:
            self._system("http").get_file(address, sink, callback=watch, raise_for_status=answer, **options)
        except TimeoutError:
            raise _Fault(f"next to nothing came for {self.stall_seconds:g} s", may_pass=True) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _connection_fault(error) from None

    def _signed(self, url: str) -> str:
        """Return the http(s) URL that reads an s3 URL, signed with the credentials of this process."""
        try:
            system = self._system("s3")
        except ImportError:
            raise _Fault(
                "S3 needs a library that is not installed: run pip install -e '.[s3]' in the checkout"
            ) from None
        from botocore.exceptions import BotoCoreError, NoCredentialsError

        try:
            return system.url(url, expires=SIGNATURE_SECONDS)
        except NoCredentialsError:
            raise _Fault(f"no credentials for S3; {S3_CREDENTIALS}") from None
        except (BotoCoreError, ValueError) as error:
            what = f"no request can be signed, {type(error).__name__}"
            raise _Fault(f"{what}; correct the bucket, AWS_ENDPOINT_URL_S3, AWS_REGION or ~/.aws") from None

    def _system(self, kind: str) -> Any:
        """Return this process's file system: fsspec's are neither inherited by a forked child nor sent to another."""
        key = (os.getpid(), kind)
        if key not in self._systems:
            self._systems.setdefault(key, _s3_system() if kind == "s3" else _http_system(self.stall_seconds))
        return self._systems[key]


class _Answer:
    """Checks the head of each answer, where aiohttp would only look at the status; keeps the size of the whole file."""

    def __init__(self, url: str, *, range_allowed: bool = False) -> None:
        self._is_s3 = _is_s3(url)
        self._is_secret = url.lower().startswith("https:")
        self._range_allowed = range_allowed
        self.total: int | None = None

    async def __call__(self, response: Any) -> None:
        _check_status(response, S3_CREDENTIALS if self._is_s3 else HTTP_CREDENTIALS)
        if self._is_secret and response.url.scheme != "https":
            raise _Fault("it redirects from https to http; give the address it redirects to, if you trust it")
        if response.headers.get("Content-Encoding", "").lower() not in ("", "identity", "aws-chunked"):
            raise _Fault("the server sends it compressed though asked not to; turn Content-Encoding off for it")
        self.total = response.content_length
        if response.status != 200:
            match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not self._range_allowed or match is None:
                raise _Fault(f"the server answers {response.status} without a usable Content-Range", may_pass=True)
            self.total = int(match[1])
        if response.status == 416:
            if self.total:
                raise _Fault("the server has no first byte of it", may_pass=True)
            raise WrongSize("0 bytes")  # of an empty file, no byte can be asked for


class _Watch:
    """Ends a body that grows too long, or comes so slowly that it may never end. Called after each piece."""

    def __init__(self, at_most: int, stall_seconds: float) -> None:
        self._at_most = at_most
        self._stall_seconds = stall_seconds
        self._since = time.monotonic()
        self._seen = 0

    def __call__(self, size: int | None, value: int) -> None:
        if (size or 0) > self._at_most or value > self._at_most:
            raise WrongSize(f"{size} bytes" if size else f"more than {self._at_most} bytes")
        now = time.monotonic()
        if now - self._since > self._stall_seconds:
            if value - self._seen < MIN_BYTES:
                raise _Fault(f"next to nothing came for {self._stall_seconds:g} s", may_pass=True)
            self._since, self._seen = now, value


def _http_system(stall_seconds: float) -> Any:
    from aiohttp import ClientTimeout
    from fsspec.implementations.http import HTTPFileSystem

    client = {
        "headers": {"Accept-Encoding": "identity"},
        "read_bufsize": 2**20,
        "requote_redirect_url": False,  # it may be signed
        "timeout": ClientTimeout(total=None, connect=stall_seconds, sock_read=stall_seconds),
        "trust_env": True,  # ~/.netrc, and proxies
    }
    return HTTPFileSystem(skip_instance_cache=True, encoded=True, client_kwargs=client)


def _s3_system() -> Any:
    from s3fs import S3FileSystem

    return S3FileSystem(skip_instance_cache=True, config_kwargs={"signature_version": "s3v4"})


def _is_s3(url: str) -> bool:
    return url.lower().startswith("s3:")


def _encoded(url: str) -> str:
    """Encode what is not ASCII, and nothing else: to quote a URL anew would break its signature."""
    scheme, colon, rest = url.partition(":")
    return f"{scheme.lower()}{colon}{quote(rest, safe=string.printable)}"


def _check_status(response: Any, credentials: str) -> None:
    status = response.status
    if status in (404, 410):
        raise _Absent()
    if region := response.headers.get("x-amz-bucket-region", "") if status in (301, 307, 400) else "":
        raise _Fault(f"its bucket is in another region; set AWS_REGION={region[:30]!r}")
    if status in (401, 403, 407):
        raise _Fault(f"the server answers {status}, not allowed; {credentials}")
    if status in TRY_LATER or status >= 500:
        raise _Fault(f"the server answers {status}", may_pass=True)
    if status not in (200, 206, 416):
        raise _Fault(f"the server answers {status}; correct the URL, or look at the server")


def _connection_fault(error: Exception) -> _Fault:
    """Tell what is wrong with a connection: the library's own words hold URLs with their queries."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return _Fault("its certificate is not valid; correct the host, or name its authority in SSL_CERT_FILE")
    if isinstance(error, aiohttp.ClientConnectorSSLError) and "WRONG_VERSION" in str(error):
        return _Fault("it does not speak https on this port; correct the URL")
    if isinstance(error, aiohttp.TooManyRedirects):
        return _Fault("it redirects in a circle; give the address of the file itself")
    if isinstance(error, aiohttp.InvalidURL | aiohttp.RedirectClientError | aiohttp.NonHttpUrlClientError):
        return _Fault("it redirects to something that is not http(s); give the address of the file itself")
    if isinstance(error, aiohttp.ClientConnectorDNSError | socket.gaierror):
        return _Fault("no such host", may_pass=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        return _Fault("the connection ended before all was sent", may_pass=True)
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        return _Fault(os.strerror(error.errno or 0).lower(), may_pass=True)
    return _Fault(f"the connection failed, {type(error).__name__}", may_pass=True)
