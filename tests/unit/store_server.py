"""A real S3 server on loopback (moto's, a process of its own) and a proxy before it that fails on request."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "very-secret-key"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Server:
    """moto's server; it keeps everything in memory, so `die` loses what it held."""

    def __init__(self, log: Path) -> None:
        self.port, self._log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        with open(self._log, "a") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if self.request("PUT", f"/{BUCKET}") < 300:
                    return
            if time.monotonic() > end or self.process.poll() is not None:
                self.die()
                raise RuntimeError(self._log.read_text())
            time.sleep(0.1)

    def die(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def request(self, method: str, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            scope = "testing/20260101/us-east-1/s3/aws4_request"  # moto reads the region from it
            connection.request(
                method, path, headers={"Authorization": f"AWS4-HMAC-SHA256 Credential={scope}, "}
            )
            return connection.getresponse().status
        finally:
            connection.close()

    def environment(self, url: str = "") -> dict[str, str]:
        cleaned = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        own = {"AWS_ENDPOINT_URL": url or self.url, "AWS_DEFAULT_REGION": "us-east-1"}
        return cleaned | CREDENTIALS | own | {"AWS_EC2_METADATA_DISABLED": "true"}


class Proxy:
    """Passes requests on to a server. `fail` decides for each (method, path) whether it is answered with an
    error instead; `delay` are the seconds each one takes.
    """

    def __init__(self, server: Server) -> None:
        self.fail: Any = lambda method, path: False
        self.delay = 0.0
        self.seen: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.body()
                proxy.seen.append((self.command, self.path))
                time.sleep(proxy.delay)
                if proxy.fail(self.command, self.path):
                    self.answer(503, {"Content-Type": "application/xml"}, ERROR)
                    return
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    self.answer(response.status, dict(response.getheaders()), response.read())
                except OSError:
                    self.close_connection = True
                finally:
                    connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def body(self) -> bytes:
                if self.headers.get("Expect") == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                    raw = b""
                    while True:
                        line = self.rfile.readline()
                        size = int(line.split(b";")[0], 16)
                        data = self.rfile.read(size)
                        raw += line + data + self.rfile.readline()
                        if not size:
                            return raw
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                length = headers.get("Content-Length", str(len(body)))
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


ERROR = b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code><Message>planted</Message></Error>"
