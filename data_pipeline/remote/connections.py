"""One request to an http(s) or S3 server, bounded in time and memory. The door to fsspec, aiohttp and s3fs.

S3 is read by signed http(s) requests, so that everything goes one way. Nothing of those libraries is imported before
the first request; sessions belong to one process and are neither inherited nor sent.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

PIECE_BYTES = 2**20  # larger ones come slower: their memory is new each time
MIN_BYTES = 64 * 2**10  # must arrive within the stall time: byte by byte, a server could keep us for years
SIGNATURE_SECONDS = 3600
SESSION_SECONDS = 60.0  # to find credentials and to load what S3 needs
TRY_LATER = (408, 425, 429)
CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18}|\*)")
S3_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or fill ~/.aws, or correct the path"
HTTP_CREDENTIALS = "put user and password of this host into ~/.netrc, renew a signed URL, or correct the path"
NO_S3FS = "S3 needs a library that is not installed: pip install nextscale[s3]"

Result = TypeVar("Result")


class Interrupted(Exception):
    """A request failed that may succeed when repeated. The text tells people how, without any URL."""


class Refused(Exception):
    """A request failed and would again. The text tells people how, and what to do, without any URL."""


class Absent(Exception):
    """There is no such file."""


class Body:
    """What one request brings. start: its first byte; total: bytes of the whole file, if the server says."""

    def __init__(self, connections: Connections, response: Any, start: int, total: int | None) -> None:
        self._connections = connections
        self._response = response
        self.start = start
        self.total = total
        self.version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        self._failure: Exception | None = None

    def read(self, limit: int) -> bytes:
        """The next piece, at most `limit` and PIECE_BYTES bytes; empty at the end. Raises Interrupted.

        What came before a connection failed is returned first, so that nothing must be sent twice.
        """
        return self._connections.run(self._read(min(limit, PIECE_BYTES)))

    def close(self) -> None:
        """Give the connection back if all was read, else end it."""
        self._connections.run(self._close())

    async def _read(self, limit: int) -> bytes:
        pieces: list[bytes] = []
        size, ended = 0, False
        content = self._response.content
        try:
            while size < limit and not ended and self._failure is None:
                wanted = min(limit, size + MIN_BYTES)
                async with asyncio.timeout(self._connections.stall_seconds):
                    while size < wanted and not ended:
                        piece = await content.read(limit - size)
                        pieces.append(piece)
                        size += len(piece)
                        ended = not piece
        except Exception as error:  # whatever it is, it is raised when nothing is left to return
            self._failure = error
            self._response.close()  # nothing more is to come, byte by byte
            content.set_exception(None)  # or it would be raised before what has arrived
        if self._failure is not None:
            pieces.append(content.read_nowait(limit - size))
            size += len(pieces[-1])
            if not size:
                raise self._failure
        return b"".join(pieces)

    async def _close(self) -> None:
        self._response.release()


class Connections:
    """The sessions of one process, served by fsspec's thread. For many threads at once."""

    def __init__(self, stall_seconds: float) -> None:
        from fsspec.asyn import get_loop

        self.stall_seconds = stall_seconds
        self._loop = get_loop()
        self._opening = asyncio.Lock()
        self._http: Any = None
        self._s3: Any = None
        self._sessions: list[Any] = []
        weakref.finalize(self, _close_sessions, os.getpid(), self._loop, self._sessions)

    def open(self, url: str, *, start: int = 0, stop: int | None = None) -> Body:
        """Ask for the bytes from `start`, up to before `stop`; the server may send others: look at the body's start.

        Raises Interrupted, Refused or Absent.
        """
        is_s3 = _scheme(url) == "s3"
        if is_s3:
            _import_s3fs()
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        response = self.run(self._get(url, headers))
        try:
            _check_status(response, HTTP_CREDENTIALS if not is_s3 else S3_CREDENTIALS)
            if _scheme(url) == "https" and response.url.scheme != "https":
                raise Refused("it redirects from https to http; give the address it redirects to, if you trust it")
            first, total = _what_comes(response)
        except BaseException:
            self.run(_close(response))
            raise
        return Body(self, response, first, total)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run it in fsspec's thread. Raises Interrupted or Refused for every way in which a connection can fail."""
        from aiohttp import ClientError

        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except TimeoutError:
            raise Interrupted(f"next to nothing came for {self.stall_seconds:g} s") from None
        except (ClientError, OSError) as error:
            raise _connection_fault(error) from None
        finally:
            future.cancel()  # when this thread was interrupted

    async def _get(self, url: str, headers: dict[str, str]) -> Any:
        async with asyncio.timeout(SESSION_SECONDS), self._opening:
            session = await self._http_session()
            address = await self._signed(url) if _scheme(url) == "s3" else url
        async with asyncio.timeout(self.stall_seconds):
            return await session.get(_as_it_is(address), headers=headers)

    async def _http_session(self) -> Any:
        from aiohttp import ClientTimeout, DummyCookieJar
        from fsspec.implementations.http import HTTPFileSystem

        if self._http is None:
            client = {
                "auto_decompress": False,  # or a small body could become a large one
                "cookie_jar": DummyCookieJar(),
                "read_bufsize": 2**20,
                "requote_redirect_url": False,  # it may be signed
                "timeout": ClientTimeout(total=None, sock_connect=None),  # ours is stricter
                "trust_env": True,  # ~/.netrc, and proxies
            }
            system = HTTPFileSystem(asynchronous=True, skip_instance_cache=True, client_kwargs=client)
            self._sessions.append(await system.set_session())
            self._http = system
        return await self._http.set_session()

    async def _signed(self, url: str) -> str:
        """An s3:// URL as the http(s) URL that reads it, signed with the credentials of this process."""
        from botocore.exceptions import BotoCoreError, NoCredentialsError
        from s3fs import S3FileSystem

        try:
            if self._s3 is None:
                config = {"signature_version": "s3v4"}
                system = S3FileSystem(asynchronous=True, skip_instance_cache=True, config_kwargs=config)
                self._sessions.append(await system.set_session())
                self._s3 = system
            client = await self._s3.set_session()
            parts = urlsplit(url)
            target = {"Bucket": parts.netloc, "Key": parts.path[1:]}
            return await client.generate_presigned_url("get_object", Params=target, ExpiresIn=SIGNATURE_SECONDS)
        except NoCredentialsError:
            raise Refused(f"no credentials for S3; {S3_CREDENTIALS}") from None
        except (BotoCoreError, ValueError) as error:
            what = f"no request can be signed, {type(error).__name__}"
            raise Refused(f"{what}; correct the bucket, AWS_ENDPOINT_URL_S3, AWS_REGION or ~/.aws") from None


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _import_s3fs() -> None:
    # Here and not in fsspec's thread, where all other requests would wait for it.
    try:
        import s3fs  # noqa: F401
    except ImportError:
        raise Refused(NO_S3FS) from None


def _as_it_is(url: str) -> Any:
    """A URL that is not quoted anew, which would break its signature."""
    from yarl import URL

    scheme, colon, rest = url.partition(":")
    return URL(f"{scheme.lower()}{colon}{rest}", encoded=url.isascii())


async def _close(response: Any) -> None:
    response.close()


def _check_status(response: Any, credentials: str) -> None:
    status = response.status
    if status in (404, 410):
        raise Absent()
    if region := response.headers.get("x-amz-bucket-region", "") if status in (301, 307, 400) else "":
        raise Refused(f"its bucket is in another region; set AWS_REGION={region[:30]!r}")
    if status in (401, 403, 407):
        raise Refused(f"the server answers {status}, not allowed; {credentials}")
    if status in TRY_LATER or status >= 500:
        raise Interrupted(f"the server answers {status}")
    if status not in (200, 206, 416):
        raise Refused(f"the server answers {status}; correct the URL, or look at the server")
    if response.headers.get("Content-Encoding", "").lower() not in ("", "identity", "aws-chunked"):
        raise Refused("the server sends it compressed though asked not to; turn Content-Encoding off for it")


def _what_comes(response: Any) -> tuple[int, int | None]:
    """The first byte of a body, and the size of the whole file if the server says."""
    if response.status == 200:
        return 0, response.content_length
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or (response.status == 206 and match[1] is None):
        raise Interrupted(f"the server answers {response.status} without a usable Content-Range")
    total = None if match[2] == "*" else int(match[2])
    if response.status == 416:
        if total != 0:  # of an empty file, no byte can be asked for
            raise Interrupted("the server has fewer bytes than before")
        return 0, 0
    return int(match[1]), total


def _connection_fault(error: Exception) -> Interrupted | Refused:
    """What is wrong with a connection, in words: the library's own hold URLs with their queries."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return Refused("its certificate is not valid; correct the host, or name its authority in SSL_CERT_FILE")
    if isinstance(error, aiohttp.ClientConnectorSSLError) and "WRONG_VERSION" in str(error):
        return Refused("it does not speak https on this port; correct the URL")
    if isinstance(error, aiohttp.RedirectClientError | aiohttp.NonHttpUrlClientError):
        return Refused("it redirects to something that is not http(s); give the address of the file itself")
    if isinstance(error, aiohttp.InvalidURL):
        return Refused("is no URL; correct it")
    if isinstance(error, aiohttp.TooManyRedirects):
        return Refused("it redirects in a circle; give the address of the file itself")
    if isinstance(error, aiohttp.ClientConnectorDNSError | socket.gaierror):
        return Interrupted("no such host")
    if isinstance(error, aiohttp.ClientPayloadError):
        return Interrupted("the connection ended before all was sent")
    if isinstance(error, OSError) and error.errno:
        return Interrupted(os.strerror(error.errno).lower() if error.errno > 0 else "no connection")
    return Interrupted(f"the connection failed, {type(error).__name__}")


def _close_sessions(owner: int, loop: asyncio.AbstractEventLoop, sessions: list[Any]) -> None:
    async def close() -> None:
        for session in sessions:
            await session.close()

    if os.getpid() != owner or not loop.is_running():
        return  # a forked child shares the connections of its parent and must not touch them
    closing = asyncio.run_coroutine_threadsafe(close(), loop)
    if getattr(loop, "_thread_id", None) != threading.get_ident():
        try:
            closing.result(timeout=1)
        except TimeoutError:
            pass
