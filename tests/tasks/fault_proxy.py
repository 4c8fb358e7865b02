"""An HTTP proxy in front of a test server that fails on purpose: errors, resets, truncation, corruption, slowness.

Refuses to know S3. Used by `test_store_s3.py`; `proxy.faults` holds what happens to the next matching requests.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DROPPED = {"transfer-encoding", "connection", "content-length"}


@dataclass
class Proxy:
    """`faults` are (method, part of the path, fault); each strikes once and is gone."""

    target: tuple[str, int]
    url: str = ""
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range header
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_for(self, method: str, path: str) -> str:
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and fault[1] in path:
                    self.faults.remove(fault)
                    return fault[2]
        return ""


@contextmanager
def fault_proxy(target: tuple[str, int]) -> Iterator[Proxy]:
    proxy = Proxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            _handle(self, proxy)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _handle(request: BaseHTTPRequestHandler, proxy: Proxy) -> None:
    proxy.seen.append((request.command, request.path, request.headers.get("Range", "")))
    fault = proxy.fault_for(request.command, request.path)
    if fault == "reset":
        return _reset(request)
    body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
    if fault == "500":
        return _answer(request, 500, {}, b"<Error><Code>InternalError</Code></Error>")
    if fault == "skew":
        return _answer(request, 403, {}, b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
    if fault == "denied":
        return _answer(request, 403, {}, b"<Error><Code>InvalidAccessKeyId</Code></Error>")
    upstream = http.client.HTTPConnection(*proxy.target, timeout=30)
    sent = {name: value for name, value in request.headers.items() if name.lower() != "expect"}  # answered already
    upstream.request(request.command, request.path, body, sent)
    reply = upstream.getresponse()
    data, headers = reply.read(), {k: v for k, v in reply.getheaders() if k.lower() not in DROPPED}
    length = len(data)
    if request.command == "HEAD":
        length = int(reply.getheader("Content-Length", 0))
    if fault == "corrupt":
        data = bytes([data[0] ^ 1]) + data[1:]
        headers = {k: v for k, v in headers.items() if not k.lower().startswith("x-amz-checksum")}
    if fault == "slow":
        time.sleep(1.0)
    if fault == "truncate":
        data = data[: length // 2]
    _answer(request, reply.status, headers, data, length)
    if fault == "truncate":
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)
    return None


def _answer(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, length: int | None = None
) -> None:
    request.send_response_only(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(data) if length is None else length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)


def _reset(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()
