"""A bucket that forgets: it speaks as much S3 as the store does, keeps small objects, and of large ones only the size.

What it hands back for a large object is zeros, so a sparse artifact goes up, comes down and verifies while neither the
bucket's memory nor its disk is part of what is measured. Refuses to be a test double: tests use moto's S3 server.
Run it: `python infra/bench_reports/zero_bucket.py` prints its URL; `store_bench.py` starts it by itself.
"""

from __future__ import annotations

import re
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SMALL_BYTES = 1 << 20
_ZEROS = bytes(1 << 20)


class Bucket:
    """Objects by key: bytes, or the size of what was forgotten; and parts of uploads under way."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes | int] = {}
        self.parts: dict[str, dict[int, int]] = {}
        self.guard = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_: object) -> None:
        pass

    def do_PUT(self) -> None:
        key, query = self._target()
        body, size = self._read()
        with self.bucket.guard:
            if "partNumber" in query:
                self.bucket.parts[query["uploadId"]][int(query["partNumber"])] = size
            elif self.headers.get("If-None-Match") == "*" and key in self.bucket.objects:
                return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            else:
                self.bucket.objects[key] = body if size <= SMALL_BYTES else size
        return self._answer(200, b"", ETag='"etag"')

    def do_POST(self) -> None:
        key, query = self._target()
        self._read()
        with self.bucket.guard:
            if "uploads" in query:
                self.bucket.parts[key] = {}
                return self._xml("InitiateMultipartUploadResult", f"<UploadId>{escape(key)}</UploadId>")
            self.bucket.objects[key] = sum(self.bucket.parts.pop(query["uploadId"]).values())
        return self._xml("CompleteMultipartUploadResult", '<ETag>"etag"</ETag>')

    def do_DELETE(self) -> None:
        self.bucket.objects.pop(self._target()[0], None)
        self._answer(204, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        key, query = self._target()
        if "uploads" in query:
            return self._xml("ListMultipartUploadsResult", "")
        if "uploadId" in query:
            return self._xml("ListPartsResult", "")
        if "/" not in key:
            names = sorted(f"/{name}" for name in self.bucket.objects if name.startswith(f"{key}/{query['prefix']}"))
            keys = "".join(f"<Contents><Key>{escape(name.split('/', 2)[2])}</Key></Contents>" for name in names)
            return self._xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{keys}")
        found = self.bucket.objects.get(key)
        if found is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self._send(found)

    def _send(self, found: bytes | int) -> None:
        size = len(found) if isinstance(found, bytes) else found
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked.group(1)) if asked else 0
        self._head(206 if asked else 200, size - start, ETag='"etag"')
        if self.command == "HEAD":
            return
        if isinstance(found, bytes):
            self.wfile.write(found[start:])
            return
        for at in range(start, size, len(_ZEROS)):
            self.wfile.write(_ZEROS[: size - at])

    def _read(self) -> tuple[bytes, int]:
        """The body if it is small, and its length."""
        left = int(self.headers.get("x-amz-decoded-content-length") or self.headers.get("Content-Length") or 0)
        chunked = "aws-chunked" in self.headers.get("Content-Encoding", "")
        kept, size = b"", left
        wire = int(self.headers.get("Content-Length") or 0)
        while wire > 0:
            piece = self.rfile.read(min(wire, 1 << 20))
            wire -= len(piece)
            kept = kept + piece if size <= SMALL_BYTES else b""
        return (_unchunked(kept) if chunked else kept), size

    def _target(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return unquote(parts.path).strip("/"), query

    def _xml(self, name: str, inner: str) -> None:
        self._answer(200, f"<?xml version='1.0'?><{name}>{inner}</{name}>".encode())

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self._head(status, len(body), **headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.send_response_only(status)
        now = formatdate(usegmt=True)
        for name, value in {**headers, "Content-Length": str(length), "Date": now, "Last-Modified": now}.items():
            self.send_header(name, value)
        self.end_headers()


def _unchunked(body: bytes) -> bytes:
    """The bytes inside aws-chunked framing: size in hex, line end, bytes, line end."""
    out = b""
    while body:
        line, _, body = body.partition(b"\r\n")
        size = int(line.split(b";")[0] or b"0", 16)
        if not size:
            break
        out, body = out + body[:size], body[size + 2 :]
    return out


def serve() -> ThreadingHTTPServer:
    """A server on a free port of this machine, not yet running."""
    Handler.bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


if __name__ == "__main__":
    running = serve()
    print(f"http://127.0.0.1:{running.server_address[1]}", flush=True)
    try:
        running.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
