"""One client connection of the front: requests in, an engine connection for each, responses out.

Framing is understood just far enough to know when a response is whole: the request's head and Content-Length, the
response's head, and that the engine closes after each answer because we ask it to. So a token costs one read and one
write here, whatever it is.

It refuses request bodies of unknown length (411), heads above 64 KiB (431), and to hide an engine that broke off: the
client's connection breaks off too.

Run it: part of `python -m engine_plugins.trtllm.front`.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

from engine_plugins.native.admission import Admission

MAX_HEAD_BYTES = 64 << 10
KEEP_ALIVE_S = 20  # longer than the usual clients' own limits: they close first, nothing is cut
RETRY_AFTER_S = 2
END = b"\r\n\r\n"
HOP_BY_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"expect")
REASONS = {400: "Bad Request", 411: "Length Required", 431: "Request Header Fields Too Large", 502: "Bad Gateway"}


class Head:
    """The first lines of a message."""

    def __init__(self, data: bytes) -> None:
        self.first, *lines = data.split(b"\r\n")
        self.fields = [tuple(part.strip() for part in line.split(b":", 1)) for line in lines]
        if any(len(field) != 2 for field in self.fields):
            raise ValueError("a header line without a colon")

    def get(self, name: bytes) -> bytes:
        return next((value for key, value in self.fields if key.lower() == name), b"")

    @property
    def length(self) -> int | None:
        text = self.get(b"content-length")
        return int(text) if text else None

    def rewritten(self, connection: bytes) -> bytes:
        """The head with our own Connection field."""
        kept = [b": ".join(field) for field in self.fields if field[0].lower() not in HOP_BY_HOP]
        return b"\r\n".join([self.first, *kept, b"Connection: " + connection]) + END


class Client(asyncio.Protocol):
    """One connection of a client. `server` is the address it came to, as uvicorn's protocols have it."""

    def __init__(self, admission: Admission, peers: set[Client], engine: tuple[str, int]) -> None:
        self.admission, self.peers, self.engine = admission, peers, engine
        self.server: tuple[str, int] = ("", 0)
        self.waiting = bytearray()
        self.answer: Answer | None = None
        self.body_left = 0
        self.keeps = True
        self.refused = False
        self._idle: asyncio.TimerHandle | None = None

    # The client's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.server = (transport.get_extra_info("sockname") or ("", 0))[:2]
        self.peers.add(self)
        self._wait_idle()

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            self.waiting += data
            self._go_on()

    def connection_lost(self, _: Exception | None) -> None:
        self.peers.discard(self)
        self._stop_waiting()
        if self.answer is not None:
            self.answer.abandon()
            self._done()

    def pause_writing(self) -> None:
        if self.answer is not None:
            self.answer.pause(True)

    def resume_writing(self) -> None:
        if self.answer is not None:
            self.answer.pause(False)

    def close(self) -> None:
        self.transport.close()

    def _wait_idle(self) -> None:
        self._idle = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self.close)

    def _stop_waiting(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    # Requests

    def _go_on(self) -> None:
        if self.answer is not None:
            self._send_body()
            return
        while self.waiting.startswith(b"\r\n"):  # some clients send one too many
            del self.waiting[:2]
        head, found, _ = bytes(self.waiting).partition(END)
        if found:
            del self.waiting[: len(head) + len(END)]
            self._begin(head)
        elif len(self.waiting) > MAX_HEAD_BYTES:
            self.refuse(431, "the request's head is too long")

    def _begin(self, data: bytes) -> None:
        self._stop_waiting()
        try:
            head = Head(data)
            self.body_left = head.length or 0
            version = head.first.rsplit(b" ", 1)[1]
        except (ValueError, IndexError):
            self.refuse(400, "not an HTTP/1.1 request")
            return
        if head.get(b"transfer-encoding"):
            self.refuse(411, "send the body with a Content-Length")
        elif self.admission.draining:
            self.refuse(503, "the server is draining; try again")
        else:
            self.keeps = version == b"HTTP/1.1" and head.get(b"connection").lower() != b"close"
            if head.get(b"expect").lower() == b"100-continue":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.admission.num_active += 1
            self.answer = Answer(self, head.rewritten(b"close"), is_head=head.first.startswith(b"HEAD "))
            self._send_body()

    def _send_body(self) -> None:
        assert self.answer is not None
        part = bytes(self.waiting[: self.body_left])
        if part:
            del self.waiting[: len(part)]
            self.body_left -= len(part)
            self.answer.send(part)
        elif len(self.waiting) > MAX_HEAD_BYTES:  # pipelined requests wait their turn, within limits
            self.transport.pause_reading()

    # Answers

    def connection_field(self) -> bytes:
        """Whether this answer is the connection's last."""
        self.keeps = self.keeps and not self.admission.closes({"server": self.server})
        return b"keep-alive" if self.keeps else b"close"

    def finished(self, whole: bool) -> None:
        """The engine's answer has ended; one that broke off breaks the client's connection too."""
        self._done()
        if not whole:
            self.transport.abort()
        elif not self.keeps or self.body_left:  # a body that nobody read cannot be told from the next request
            self.transport.close()
        else:
            self._wait_idle()
            self.transport.resume_reading()
            self._go_on()

    def refuse(self, status: int, text: str) -> None:
        """Answer in the engine's place, in OpenAI's shape, and close."""
        self.refused = True
        self._stop_waiting()
        if self.answer is not None:
            self._done()
        body = b'{"error": {"message": "%b", "type": "server_error", "param": null, "code": null}}' % text.encode()
        again = b"Retry-After: %d\r\n" % RETRY_AFTER_S if status == 503 else b""
        reason = REASONS.get(status, "Service Unavailable").encode()
        self.transport.write(
            b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\n%bConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (status, reason, again, len(body), body)
        )
        asyncio.get_running_loop().create_task(self._close_gently())

    async def _close_gently(self) -> None:
        """Take in what is still being sent: closing on unread bytes would reset the answer away."""
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
            await asyncio.sleep(0.2)
        self.transport.close()

    def _done(self) -> None:
        self.answer = None
        self.admission.num_active -= 1


class Answer(asyncio.Protocol):
    """One request's connection to the engine, which closes it when the answer is whole."""

    def __init__(self, client: Client, head: bytes, is_head: bool) -> None:
        self.client: Client | None = client
        self.is_head = is_head
        self.outgoing = bytearray(head)
        self.transport: asyncio.Transport | None = None
        self.head: Head | None = None
        self.received = bytearray()
        self.left: int | None = None
        self.tail = b""
        self._connecting = asyncio.get_running_loop().create_task(self._connect(client.engine))

    async def _connect(self, engine: tuple[str, int]) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, *engine)
        except OSError:
            if self.client is not None:
                client, self.client = self.client, None
                client.refuse(503, "the engine does not answer yet")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.client is None:
            self.transport.abort()
            return
        self.transport.write(bytes(self.outgoing))

    def send(self, part: bytes) -> None:
        """More of the request's body."""
        if self.transport is None:
            self.outgoing += part
        else:
            self.transport.write(part)

    def pause(self, wanted: bool) -> None:
        """The client reads slower than the engine writes."""
        if self.transport is not None:
            (self.transport.pause_reading if wanted else self.transport.resume_reading)()

    def abandon(self) -> None:
        """The client is gone: the engine sees its connection close, and cancels."""
        self.client = None
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.client is None:
            return
        if self.head is None:
            self.received += data
            text, found, rest = bytes(self.received).partition(END)
            if not found:
                return
            if text.split(b" ", 2)[1:2] == [b"100"]:  # our own answer to Expect has gone out already
                self.received = bytearray(rest)
                self.data_received(b"")
                return
            self._start(text)
            data = rest
        if data:
            self.tail = (self.tail + data)[-5:]
            if self.left is not None:
                self.left -= len(data)
            self.client.transport.write(data)

    def _start(self, text: bytes) -> None:
        assert self.client is not None
        self.head = Head(text)
        self.left = 0 if self.is_head or b" 204 " in text[:16] or b" 304 " in text[:16] else self.head.length
        if self.left is None and not self._chunked:
            self.client.keeps = False  # its end is the end of the connection
        self.client.transport.write(self.head.rewritten(self.client.connection_field()))

    @property
    def _chunked(self) -> bool:
        return self.head is not None and self.head.get(b"transfer-encoding").lower() == b"chunked"

    def connection_lost(self, _: Any) -> None:
        client, self.client = self.client, None
        if client is None:
            return
        if self.head is None:
            client.refuse(502, "the engine broke off before it answered")
        else:
            client.finished(self.tail == b"0\r\n\r\n" if self._chunked and self.left is None else not self.left)
