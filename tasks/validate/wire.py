"""HTTP/1.1 on a raw asyncio socket, built to time token streams: read first, parse afterwards.

While a reply streams in, the only work per read is: note the clock, append the bytes, look at the last four of them.
Chunked framing, SSE and JSON are parsed after the measured run, from the bytes and the arrival times. So the client
costs little CPU per token, and falling behind for a moment merges reads but does not move the end of the stream.

It refuses to be a general HTTP client: no redirects, no compression, no proxies, no pipelining.

Run: `python -m tasks.validate.selftest` times it against a mock server of known timing.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

clock = time.perf_counter

READ_BUFFER_BYTES = 1 << 16
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
MAX_HEAD_BYTES = 1 << 16
LAST_CHUNK = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Address:
    """Where an OpenAI-compatible API lives. `prefix` is the path before `/v1`."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False

    @classmethod
    def parse(cls, base_url: str) -> Address:
        """From `http://host:port`, with or without `/v1`. Raises ValueError for anything else."""
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) URL: {base_url!r}")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.hostname, parts.port or (443 if tls else 80), prefix, tls)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.prefix}"

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """The bytes of one HTTP/1.1 request. `path` starts with `/`."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Accept: */*"]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class RawReply:
    """Everything that arrived for one request, unparsed. `error` names how it ended when it did not end well."""

    sent_s: float = 0.0
    blob: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    error: str = ""


class Connection(asyncio.BufferedProtocol):
    """One keep-alive connection; one request in flight at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.buffer = bytearray(READ_BUFFER_BYTES)
        self.view = memoryview(self.buffer)
        self.reply = RawReply()
        self.done: asyncio.Future[None] | None = None
        self.closed = False
        self._reset_framing()

    def _reset_framing(self) -> None:
        self.head_end = -1
        self.body_length = -1  # -1: chunked or until close
        self.chunked = False
        self.scan = 0

    # asyncio.BufferedProtocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.view

    def buffer_updated(self, nbytes: int) -> None:
        reply = self.reply
        reply.times_s.append(clock())
        blob = reply.blob
        blob += self.view[:nbytes]
        reply.ends.append(len(blob))
        if self.head_end < 0:
            self._read_head()
        if self.chunked:
            # The usual end needs no walk over the chunk sizes, which would delay every other stream's clock by
            # milliseconds just when all of them end; parse_reply checks the framing later. Trailers and servers that
            # end their events with CRLF take the walk.
            if blob.endswith(LAST_CHUNK) or (blob.endswith(b"\r\n\r\n") and self._last_chunk_seen()):
                self._finish("")
        elif self.head_end >= 0 and 0 <= self.body_length <= len(blob) - self.head_end:
            self._finish("")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        until_close = self.head_end >= 0 and not self.chunked and self.body_length < 0
        self._finish("" if until_close and exc is None else "reset")

    def _read_head(self) -> None:
        blob = self.reply.blob
        end = blob.find(b"\r\n\r\n")
        if end < 0:
            if len(blob) > MAX_HEAD_BYTES:
                self._finish("malformed_http")
            return
        self.head_end = self.scan = end + 4
        headers = parse_headers(bytes(blob[:end]))
        self.chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length", "")
        self.body_length = int(length) if length.isdigit() else -1

    def _last_chunk_seen(self) -> bool:
        blob, pos = self.reply.blob, self.scan
        while True:
            line_end = blob.find(b"\r\n", pos)
            if line_end < 0:
                break
            try:
                size = int(bytes(blob[pos:line_end]).split(b";", 1)[0], 16)
            except ValueError:
                self._finish("malformed_http")
                return False
            if size == 0:
                return True  # the blob ends with an empty line, so trailers, if any, are complete
            after = line_end + 2 + size + 2
            if after > len(blob):
                break
            pos = after
        self.scan = pos
        return False

    def _finish(self, error: str) -> None:
        if self.done is not None and not self.done.done():
            self.reply.error = error
            self.done.set_result(None)

    # used by the client
    async def exchange(self, request: bytes, stall_s: float, total_s: float) -> RawReply:
        """Sends one request and waits for the whole reply, at most `total_s`, and at most `stall_s` between two
        reads.
        """
        loop = asyncio.get_running_loop()
        self._reset_framing()
        reply = self.reply = RawReply()
        self.done = loop.create_future()
        if self.closed or self.transport is None:
            reply.error = "reset"
            return reply
        reply.sent_s = clock()
        self.transport.write(request)
        watchdog = loop.call_later(min(stall_s, total_s), self._watch, stall_s, total_s, loop)
        self.watchdog = watchdog
        try:
            await self.done
        finally:
            self.watchdog.cancel()
        if reply.error:
            self.close()
        return reply

    def _watch(self, stall_s: float, total_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Wakes only as often as a stall could have happened: nothing is scheduled per read."""
        now = clock()
        last = self.reply.times_s[-1] if self.reply.times_s else self.reply.sent_s
        if now - self.reply.sent_s >= total_s:
            self._finish("timeout")
        elif now - last >= stall_s:
            self._finish("stall")
        else:
            wait = min(last + stall_s, self.reply.sent_s + total_s) - now
            self.watchdog = loop.call_later(max(wait, 0.001), self._watch, stall_s, total_s, loop)

    def close(self) -> None:
        self.closed = True
        if self.transport is not None:
            self.transport.abort()


async def connect(address: Address, timeout_s: float) -> Connection:
    """Opens a connection with Nagle off (asyncio's default). Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if address.tls else None
    opening = loop.create_connection(Connection, address.host, address.port, ssl=context)
    try:
        _, connection = await asyncio.wait_for(opening, timeout_s)
    except asyncio.TimeoutError as late:  # its own class before Python 3.11
        raise TimeoutError(f"no connection to {address.url} within {timeout_s:g} s") from late
    return connection


@dataclass(frozen=True)
class HttpReply:
    """A parsed reply: `body` without its framing, and `arrived_s(offset)` for when a body byte arrived."""

    status: int
    headers: dict[str, str]
    body: bytes
    body_ends: np.ndarray  # end offset in the body of each piece
    raw_ends: np.ndarray  # where in the raw bytes each piece ends
    read_ends: np.ndarray
    read_times_s: np.ndarray

    def arrived_s(self, body_offsets: np.ndarray) -> np.ndarray:
        """Arrival times of the bytes that end at `body_offsets` (1-based ends, as slices have)."""
        piece = np.searchsorted(self.body_ends, body_offsets, side="left")
        raw = self.raw_ends[piece] - (self.body_ends[piece] - body_offsets)
        return self.read_times_s[np.searchsorted(self.read_ends, raw, side="left")]


def parse_headers(head: bytes) -> dict[str, str]:
    """Header names in lower case; the status line under `:status`."""
    lines = head.decode("latin-1").split("\r\n")
    headers = {":status": lines[0]}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def parse_reply(raw: RawReply) -> HttpReply:
    """Undoes HTTP's framing. What arrived of a broken reply is kept. Raises ValueError when there is no valid head."""
    blob = bytes(raw.blob)
    head_end = blob.find(b"\r\n\r\n")
    if head_end < 0:
        raise ValueError("no complete HTTP head")
    headers = parse_headers(blob[:head_end])
    status = headers[":status"].split(" ")
    if len(status) < 2 or not status[0].startswith("HTTP/1.") or not status[1].isdigit():
        raise ValueError(f"not an HTTP/1.1 status line: {headers[':status'][:80]!r}")
    pos, pieces, raw_ends, whole = head_end + 4, [], [], False
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while (line_end := blob.find(b"\r\n", pos)) >= 0:
            size = int(blob[pos:line_end].split(b";", 1)[0], 16)
            if size == 0:
                whole = True
                break
            piece = blob[line_end + 2 : line_end + 2 + size]
            pieces.append(piece)
            raw_ends.append(line_end + 2 + len(piece))
            pos = line_end + 2 + size + 2
        if not whole and not raw.error:
            raise ValueError("the last chunk is missing")
    elif pos < len(blob):
        pieces, raw_ends = [blob[pos:]], [len(blob)]
    body_ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return HttpReply(
        int(status[1]), headers, b"".join(pieces), body_ends, np.asarray(raw_ends, np.int64),
        np.asarray(raw.ends, np.int64), np.asarray(raw.times_s),
    )  # fmt: skip


def sse_events(reply: HttpReply) -> list[tuple[float, bytes]]:
    """(arrival time of its last byte, data) of every complete SSE event that carries data. Comments are skipped."""
    body = reply.body
    spans, start = [], 0
    for match in EVENT_END.finditer(body):
        spans.append((start, match.end()))
        start = match.end()
    if not spans:
        return []
    times = reply.arrived_s(np.asarray([end for _, end in spans], np.int64))
    events = []
    for (begin, end), arrived in zip(spans, times.tolist(), strict=True):
        data = [line[5:].lstrip(b" ") for line in body[begin:end].splitlines() if line.startswith(b"data:")]
        if data:
            events.append((arrived, b"\n".join(data)))
    return events
