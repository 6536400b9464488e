"""Servers on localhost that fail as told: files over http with ranges, and a relay that breaks connections."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WAIT_SECONDS = 30.0  # longer than any test has patience
ENDLESS = 2**40
RANDOM_FAULTS = ("500", "503", "reset", "cut")


@dataclass
class Request:
    path: str  # with the query
    byte_range: str
    headers: dict[str, str]


@dataclass
class ShardServer:
    """`files` by path. `faults`: per path, what the next requests get, one after the other; "ok" is none.

    A fault is a status ("503"), or one of: reset, cut, wrong, stall (half of it, then nothing), silent, drip,
    no-range, endless, gzip, no-length, lie (a length that is too large), to:URL (a redirect).
    """

    files: dict[str, bytes] = field(default_factory=dict)
    faults: defaultdict[str, deque[str]] = field(default_factory=lambda: defaultdict(deque))
    always: dict[str, str] = field(default_factory=dict)  # path -> the fault of every request
    headers: dict[str, str] = field(default_factory=dict)  # of every refusal
    replacements: dict[str, bytes] = field(default_factory=dict)  # contents from the second request on
    reset_after: float = 0.02  # seconds; what the client has not read by then it does not get
    share: float = 0.0  # of requests that fail at random
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    requests: list[Request] = field(default_factory=list)
    sent: int = 0  # bytes of contents
    ended: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def count(self, path: str) -> int:
        return sum(request.path.partition("?")[0] == f"/{path}" for request in self.requests)

    def next_fault(self, path: str) -> str:
        if path in self.always:
            return self.always[path]
        if self.faults[path]:
            return self.faults[path].popleft()
        return self.generator.choice(RANDOM_FAULTS) if self.generator.random() < self.share else "ok"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        shards = self.server.shards
        path = self.path.partition("?")[0].lstrip("/")
        shards.requests.append(Request(self.path, self.headers.get("Range", ""), dict(self.headers)))
        fault = shards.next_fault(path)
        if path not in shards.files and fault == "ok":
            fault = "404"
        if fault.isdigit():
            return self.refuse(int(fault))
        if fault.startswith("to:"):
            return self.refuse(302, Location=fault[3:])
        if fault == "silent":
            self.hold()
            return None
        try:
            self.deliver(shards.files.get(path, b""), fault)
            if path in shards.replacements:
                shards.files[path] = shards.replacements.pop(path)
        except OSError:  # the client had enough
            self.close_connection = True

    def deliver(self, content: bytes, fault: str) -> None:
        first, last = self.range_of(len(content))
        if fault == "no-range" or first is None:
            status, body, headers = 200, content, {}
        elif first >= len(content):
            self.refuse(416, **{"Content-Range": f"bytes */{len(content)}"})
            return
        else:
            status, body = 206, content[first : last + 1]
            headers = {"Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(content)}"}
        headers["ETag"] = f'"{zlib.crc32(content)}"'
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "endless":
            status, headers = 200, {}
        if fault not in ("no-length", "endless"):
            headers["Content-Length"] = str(len(body) + (1000 if fault == "lie" else 0))
        self.send_head(status, headers, keep=fault in ("ok", "wrong", "no-range"))
        self.send_body(body, fault)

    def send_body(self, body: bytes, fault: str) -> None:
        if fault == "endless":
            while self.server.shards.sent < ENDLESS and not self.server.shards.ended.is_set():
                self.send(bytes(2**20))
        elif fault in ("reset", "cut", "stall"):
            self.send(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.hold()
            if fault == "reset":
                time.sleep(self.server.shards.reset_after)
                abort(self.connection)
        elif fault == "drip":
            for byte in body:
                self.send(bytes([byte]))
                if self.server.shards.ended.wait(0.02):
                    return
        else:
            self.send(body)

    def send(self, piece: bytes) -> None:
        self.wfile.write(piece)
        self.server.shards.sent += len(piece)

    def range_of(self, size: int) -> tuple[int | None, int]:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(found[1]), int(found[2] or size - 1)) if found else (None, 0)

    def refuse(self, status: int, **headers: str) -> None:
        self.send_head(status, {"Content-Length": "0", **self.server.shards.headers, **headers}, keep=True)

    def hold(self) -> None:
        self.close_connection = True
        self.server.shards.ended.wait(WAIT_SECONDS)

    def send_head(self, status: int, headers: dict[str, str], *, keep: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not keep:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, shards: ShardServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.shards = shards

    def handle_error(self, *_: object) -> None:
        pass  # clients that go away are what these tests are about


@contextmanager
def shard_server(**files: bytes) -> Iterator[ShardServer]:
    shards = ShardServer(files=files)
    server = _Server(shards)
    shards.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield shards
    finally:
        shards.ended.set()
        server.shutdown()
        server.server_close()


def abort(connection: socket.socket) -> None:
    """Close with a reset instead of a polite end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.shutdown(socket.SHUT_RD)
    connection.close()


@dataclass
class Relay:
    """Passes connections on to another port; resets some in the middle, and lets others wait forever."""

    port: int
    every: int  # how many there are to one that is reset
    stalled: set[int]  # numbers of those that wait
    connections: int = 0
    broken: int = 0


@contextmanager
def faulty_relay(target: int, *, every: int, stalled: set[int]) -> Iterator[Relay]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    relay = Relay(listener.getsockname()[1], every, stalled)
    generator = random.Random(0)
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            number, relay.connections = relay.connections, relay.connections + 1
            if number in relay.stalled:
                held.append(client)
                continue
            budget = generator.randrange(1, 60_000) if number % every == 0 else None
            relay.broken += budget is not None
            there = socket.create_connection(("127.0.0.1", target))
            threading.Thread(target=_pump, args=(client, there, None), daemon=True).start()
            threading.Thread(target=_pump, args=(there, client, budget), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield relay
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for client in held:
            client.close()


def _pump(source: socket.socket, sink: socket.socket, budget: int | None) -> None:
    """Copy one direction until its end, or until `budget` bytes went over; then reset."""
    try:
        while piece := source.recv(16384):
            if budget is not None and len(piece) >= budget:
                sink.sendall(piece[:budget])
                abort(sink)
                return
            sink.sendall(piece)
            budget = None if budget is None else budget - len(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass
