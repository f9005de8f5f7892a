"""A web server on loopback that serves pictures and every way in which a URL can fail, and one that never answers."""

import contextlib
import http.server
import io
import socket
import ssl
import threading
import time
from collections import Counter

import numpy as np
from PIL import Image

PIECE = bytes(1 << 16)


def png(seed):
    """A small picture of noise."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


class PictureServer:
    """Serves what is put into ``files``; other paths name a fault. Queries are noted in ``asked`` and ignored."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.at_work: Counter[str] = Counter()
        """Host as it was asked for -> slow answers under way."""
        self.most: Counter[str] = Counter()
        """The most there ever were of these."""
        self.sent = 0
        """Bytes of the endless body that were sent."""

    def __enter__(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.asked[self.path] += 1
                with contextlib.suppress(ConnectionError):
                    outer.answer(self, self.path.partition("?")[0].strip("/"))

            do_HEAD = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, handler, name):
        what, _, argument = name.partition("/")
        if name in self.files:
            self.reply(handler, 200, self.files[name])
        elif what == "status":
            self.reply(handler, int(argument))
        elif what == "flaky":  # fails twice
            tries = sum(count for path, count in self.asked.items() if path.startswith(f"/{name}"))
            self.reply(handler, 503 if tries <= 2 else 200, self.files[argument] if tries > 2 else b"")
        elif what == "slow":
            host = handler.headers["Host"]
            with self.lock:
                self.at_work[host] += 1
                self.most[host] = max(self.most[host], self.at_work[host])
                self.most["all"] = max(self.most["all"], self.at_work.total())
            time.sleep(0.1)
            with self.lock:
                self.at_work[host] -= 1
            self.reply(handler, 200, self.files[argument])
        elif what == "to":
            self.reply(handler, 302, Location=f"/{argument}{handler.path.partition('?')[1]}")
        elif what == "ftp":
            self.reply(handler, 302, Location="ftp://127.0.0.1/a.png")
        elif what == "loop":
            self.reply(handler, 302, Location=handler.path)
        elif what == "short":
            self.begin(handler, 1000)
            handler.wfile.write(b"only this")
            handler.close_connection = True
        elif what == "reset":
            handler.close_connection = True
        elif what == "garbage":
            handler.wfile.write(b"this is no HTTP\r\n\r\n")
            handler.close_connection = True
        elif what == "huge":  # 50 GB by its own word
            self.begin(handler, 50 << 30)
            self.pour(handler)
        elif what == "endless":
            self.begin(handler, None)
            self.pour(handler)
        elif what == "drip":
            self.begin(handler, 1000)
            for _ in range(100):
                handler.wfile.write(b".")
                time.sleep(0.1)
        else:
            self.reply(handler, 404)

    def reply(self, handler, status, body=b"", **headers):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def begin(self, handler, size):
        handler.send_response(200)
        if size is not None:
            handler.send_header("Content-Length", str(size))
        handler.send_header("Connection", "close")
        handler.end_headers()

    def pour(self, handler):
        handler.close_connection = True
        while True:
            handler.wfile.write(PIECE)
            self.sent += len(PIECE)


@contextlib.contextmanager
def silent_server():
    """The URL of a server that accepts connections, reads nothing, and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def closed_url():
    """A URL at whose port nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def _served(handler, wrap=lambda socket: socket):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.socket = wrap(server.socket)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def refusing_s3(code):
    """The endpoint of an S3 that answers everything with 403 and one of S3's words for the reason."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with _served(Handler) as place:
        yield f"http://{place}"


@contextlib.contextmanager
def untrusted_server(folder):
    """The URL of an https server whose certificate nobody has signed but itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    today = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.pem").write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    with _served(
        http.server.BaseHTTPRequestHandler, lambda plain: context.wrap_socket(plain, server_side=True)
    ) as place:
        yield f"https://{place}"
