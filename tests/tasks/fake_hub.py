"""A hub in sixty lines: the two calls that HubSource makes, with commits, LFS hashes, ranges, gates and faults.

Refuses to be more than a test needs. Used by test_download.py.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class FakeHub:
    """Serves one repository from memory; `break_after` cuts every transfer after that many bytes, once per file."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo, self.files = repo, files
        self.break_after: int | None = None
        self.gated = False
        self.ranges: list[str] = []
        self.broken: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802, the base class's name
                hub.answer(self)

            def log_message(self, *_arguments: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if self.gated:
            return self.send(request, 403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith(f"/api/models/{self.repo}/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", COMMIT):
                return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [
                {"rfilename": name, "size": len(body), **self.lfs(name, body)} for name, body in self.files.items()
            ]
            return self.send(request, 200, json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings}).encode())
        name = path.partition(f"/{self.repo}/resolve/{COMMIT}/")[2] or path.partition(f"/{self.repo}/resolve/main/")[2]
        if name not in self.files:
            code = "EntryNotFound" if name else "RepoNotFound"
            return self.send(request, 404, b"{}", {"X-Error-Code": code})
        body, span = self.files[name], request.headers.get("Range")
        if span:
            self.ranges.append(f"{name} {span}")
            return self.send(request, 206, body[int(span.removeprefix("bytes=").rstrip("-")) :])
        cut = self.break_after if name.endswith(".safetensors") and name not in self.broken else None
        self.broken.add(name)
        return self.send(request, 200, body, cut=cut)

    def lfs(self, name: str, body: bytes) -> dict[str, object]:
        if not name.endswith(".safetensors"):
            return {}
        return {"lfs": {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}}

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:  # fmt: skip  # noqa: E501
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body if cut is None else body[:cut])
        request.close_connection = True
