"""A small HTTP proxy that stands before an S3 server on loopback and, by seeded chance, spoils what passes through."""

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from urllib.parse import urlsplit

FAULTS = {
    # kind -> methods it can befall
    "error": ("GET", "HEAD", "PUT", "POST", "DELETE"),  # answered with 500 or 503, not passed on
    "throttle": ("GET", "HEAD", "PUT", "POST", "DELETE"),  # answered with 503 SlowDown, not passed on
    "deny": ("GET", "HEAD", "PUT", "POST", "DELETE"),  # answered with 403, not passed on
    "reset": ("GET", "HEAD", "PUT", "POST", "DELETE"),  # connection reset, not passed on
    "hang": ("GET", "HEAD", "PUT", "POST", "DELETE"),  # never answered, not passed on
    "slow": ("GET", "PUT"),  # the answer arrives in small pieces
    "truncate": ("GET",),  # the body breaks off in the middle
    "damage": ("PUT",),  # one byte of the body changes before it is passed on, and so does its checksum
    "lost_ack": ("PUT", "POST", "DELETE"),  # passed on and done, but the answer never arrives
}
_ONE_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "date", "server"}


class FaultProxy:
    """Serve in front of ``upstream`` until the ``with`` block ends.

    Args:
        upstream: Address of the real server, such as ``http://127.0.0.1:5000``.
        seed: Of the chance that picks the victims.
        rates: Kind of fault (see ``FAULTS``) -> probability for each request it can befall; may be changed meanwhile.

    Attributes:
        url: Where to send requests.
        ignores_conditions: Whether writes are passed on without their conditions, as by stores that know none.
        counts: How often each fault was injected, and all requests under ``requests``.
    """

    def __init__(self, upstream: str, seed: int = 0, rates: dict[str, float] | None = None):
        self.upstream = urlsplit(upstream).netloc
        self.rates = dict(rates or {})
        self.counts: Counter[str] = Counter()
        self.ignores_conditions = False
        self.closing = threading.Event()
        # moto looks and stores in two steps; S3 decides about a conditional write and does it in one.
        self.writing = threading.Lock()
        self._random, self._lock = Random(seed), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def draw(self, method: str) -> tuple[str, float]:
        """The fault that befalls the next request (empty for none), and a number from 0 to 1 for its details."""
        with self._lock:
            self.counts["requests"] += 1
            chance, detail = self._random.random(), self._random.random()
            for kind, methods in FAULTS.items():
                if method in methods:
                    chance -= self.rates.get(kind, 0.0)
                    if chance < 0:
                        self.counts[kind] += 1
                        return kind, detail
        return "", detail


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients that give up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def pass_on(self) -> None:
        body = self._read_body()
        fault, detail = self.proxy.draw(self.command)
        if fault == "reset":
            self._reset()
        elif fault == "hang":
            self.proxy.closing.wait(30)
            self._reset()
        elif fault == "deny":
            self._fail(403, "AccessDenied", "Access Denied")
        elif fault == "throttle":
            self._fail(503, "SlowDown", "Please reduce your request rate.")
        elif fault == "error" and detail < 0.5:
            self._fail(500, "InternalError", "We encountered an internal error. Please try again.")
        elif fault == "error":
            self._fail(503, "ServiceUnavailable", "Reduce your request rate.")
        else:
            status, headers, content = self._ask_upstream(_damaged(body) if fault == "damage" and body else body, fault)
            if fault == "lost_ack":
                self._reset()
            else:
                self._answer(status, headers, content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def log_message(self, format, *args):
        """Tests read the counts."""

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _ask_upstream(self, body: bytes, fault: str) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _ONE_HOP}
        if fault == "damage":
            headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
        if self.proxy.ignores_conditions:
            headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
        # http.client leaves the path as it came; what is quoted stays quoted.
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            if self.command in ("GET", "HEAD"):
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            with self.proxy.writing:
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        announced = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length":
                announced = value if self.command == "HEAD" else announced
            elif name.lower() not in _ONE_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", announced)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "slow":
            step = max(len(content) // 4, 1)
            for start in range(0, len(content), step):
                self.wfile.write(content[start : start + step])
                self.wfile.flush()
                time.sleep(0.01)
        else:
            self.wfile.write(content)

    def _fail(self, status: int, code: str, message: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        self._answer(status, [("Content-Type", "application/xml")], text.encode())

    def _reset(self) -> None:
        # With a linger of zero, closing sends a reset instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()


def _damaged(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
