"""One HTTP response while its tokens come: text, stop strings, chunks, usage, hang-up.

The first event decides the status line, so a prompt that the engine refuses is still a 400 and not a broken stream.
From then on each step's text goes straight to the socket, framed here: the HTTP library only opens and closes the
response.

It refuses to buffer: text leaves with the step that made it, unless it is half a character or may be the start of a
stop string.

Run it: it runs inside `python -m engine_plugins.native.server`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi.responses import Response

from engine_plugins.native.openai_api import ApiError, GenerationRequest, ResponseFormat, error_event, speculation_usage
from engine_plugins.native.scheduler import EngineFault, Scheduler, Ticket

MAX_UNSENT_BYTES = 4 << 20  # a client that reads slower than this is treated as gone
JSON_TYPE = (b"content-type", b"application/json")
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Generation:
    """One prompt's answer. A completions request with several prompts has several."""

    def __init__(self, prompt_ids: list[int], params: Any) -> None:
        self.prompt_ids, self.params = prompt_ids, params
        self.num_generated = 0
        self.parts: list[str] = []
        self.reason: str | None = None
        self.ticket: Ticket | None = None
        self.reply: Reply | None = None
        self.index = 0

    def on_step(self, num_tokens: int, text: str, finish_reason: str | None) -> None:
        """What one step brought, on the event loop: this is the hot path."""
        reply = self.reply
        assert reply is not None
        self.num_generated += num_tokens
        self.reason = finish_reason
        if reply.asked.stream:
            reply.emit(self.index, text, finish_reason)
        elif text:
            self.parts.append(text)
        if finish_reason is not None:
            reply.finished()

    def on_fault(self, fault: EngineFault) -> None:
        assert self.reply is not None
        self.reply.failed(fault)


class Reply(Response):
    """A raw ASGI response for one request."""

    def __init__(self, scheduler: Scheduler, asked: GenerationRequest, generations: list[Generation]) -> None:
        self.scheduler, self.asked, self.generations = scheduler, asked, generations
        self.format = ResponseFormat(asked, int(time.time()))
        self.background = None
        self._open = len(generations)
        self._opened: set[int] = set()
        self._pending: list[bytes] = []
        self._transport: Any = None
        self._chunked = True
        self._fault: EngineFault | None = None
        self._begun = asyncio.Event()  # first event of any choice
        self._done = asyncio.Event()
        self._gone = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for index, generation in enumerate(self.generations):
            generation.reply, generation.index = self, index
            generation.ticket = self.scheduler.submit(generation, generation.prompt_ids, generation.params)
        watcher = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            await (self._stream(scope, send) if self.asked.stream else self._whole(send))
        finally:
            watcher.cancel()
            self._cancel_all()

    async def _watch(self, receive: Any) -> None:
        """Ends everything when the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._hang_up()

    def _hang_up(self) -> None:
        if self._open:
            self.scheduler.totals["cancelled"] += 1
        self._gone = True
        self._cancel_all()
        self._begun.set()
        self._done.set()

    def _cancel_all(self) -> None:
        for generation in self.generations:
            if generation.ticket is not None:
                self.scheduler.cancel(generation.ticket)

    async def _whole(self, send: Any) -> None:
        await self._done.wait()
        if self._gone:
            return
        if self._fault is not None:
            await self._refuse(send, self._fault)
            return
        texts = ["".join(generation.parts) for generation in self.generations]
        reasons = [generation.reason or "stop" for generation in self.generations]
        await _send_json(send, 200, self.format.whole(texts, reasons, self.usage()))

    async def _stream(self, scope: Any, send: Any) -> None:
        await self._begun.wait()
        if self._gone:
            return
        if self._fault is not None and not self._pending:
            await self._refuse(send, self._fault)
            return
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        if scope["method"] != "HEAD":
            self._transport, self._chunked = scope["kilotok.transport"], scope["http_version"] == "1.1"
            self._write(b"")
        await self._done.wait()
        if not self._gone:
            last = (
                error_event(ApiError(self._fault.status, str(self._fault)))
                if self._fault
                else self.format.closing(self.usage())
            )
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _refuse(self, send: Any, fault: EngineFault) -> None:
        await _send_json(send, fault.status, ApiError(fault.status, str(fault)).body())

    # Called by the generations, on the event loop

    def emit(self, index: int, text: str, finish_reason: str | None) -> None:
        """One event of the stream; the role and the reason travel with the text they belong to."""
        if not text and finish_reason is None and self._opened:
            return
        chunk = self.format.chunk(index, text) if text else b""
        if index not in self._opened:
            self._opened.add(index)
            chunk = self.format.opening(index) + chunk
        if finish_reason is not None:
            chunk += self.format.chunk(index, "", finish_reason)
        self._write(chunk)

    def _write(self, chunk: bytes) -> None:
        transport = self._transport
        if transport is None:
            self._pending.append(chunk)
            self._begun.set()
            return
        if self._pending:
            chunk = b"".join(self._pending) + chunk
            self._pending.clear()
        if not chunk or transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if self._chunked else chunk)
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            transport.abort()
            self._hang_up()

    def finished(self) -> None:
        self._open -= 1
        if not self._open:
            self._done.set()

    def failed(self, fault: EngineFault) -> None:
        self._fault = self._fault or fault
        self._open = 0
        self._cancel_all()
        self._begun.set()
        self._done.set()

    def usage(self) -> dict[str, Any]:
        """Counts over all choices."""
        draft_tokens = self.scheduler.draft_tokens
        tickets = [generation.ticket for generation in self.generations if generation.ticket is not None]
        accepted = [sum(column) for column in zip(*(ticket.accepted for ticket in tickets), strict=True)]
        return speculation_usage(
            sum(len(ticket.prompt_ids) for ticket in tickets),
            sum(ticket.reused for ticket in tickets),
            sum(generation.num_generated for generation in self.generations),
            draft_tokens,
            sum(ticket.cycles for ticket in tickets),
            accepted,
        )


async def _send_json(send: Any, status: int, body: bytes) -> None:
    headers = [JSON_TYPE, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
