"""One thread steps the engine; asyncio gets every step's events in one wake-up.

The engine's `step()` runs C++ without the GIL, so while it computes the next tokens the event loop sends the last
ones. Requests and cancellations cross to the engine thread through a queue; nothing else is shared.

It refuses to batch or reorder: which request gets which slot is the engine's business. It refuses unbounded queues:
`has_room` says no when the line is full, and the server answers 429.

Run it: it runs inside `python -m engine_plugins.native.server`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections import Counter
from typing import Any, Protocol

log = logging.getLogger("kilotok.scheduler")
# Nice levels that the threads of a step stand behind whoever carries their tokens away. Side by side on two cores the
# event loop waited for milliseconds: of 64 short answers 23 to 49 came in one piece, with this 0 to 2, and no slower.
YIELDS = 10
MAX_FAILED_STEPS = 3  # in a row; then the engine is called broken and /health says so


class EngineFault(Exception):
    """The engine could not finish this request; other requests go on. `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Sink(Protocol):
    """Where one request's tokens go. Both are called on the event loop."""

    def on_step(self, num_tokens: int, text: str, finish_reason: str | None) -> None: ...

    def on_fault(self, fault: EngineFault) -> None: ...


class Ticket:
    """One submitted request."""

    def __init__(self, sink: Sink, prompt_ids: list[int], params: Any) -> None:
        self.sink, self.prompt_ids, self.params = sink, prompt_ids, params
        self.request: Any = None  # the engine's own; counts cycles and accepted drafts
        self.request_id: Any = None
        self.finished = False

    @property
    def reused(self) -> int:
        return int(self.request.reused) if self.request else 0

    @property
    def cycles(self) -> int:
        return int(self.request.cycles) if self.request else 0

    @property
    def accepted(self) -> list[int]:
        return list(self.request.accepted_by_position) if self.request else []


class Scheduler:
    """Owns the engine. Everything public is called on the event loop, except `run`."""

    def __init__(self, engine: Any, *, slots: int, draft_tokens: int, max_queue: int) -> None:
        self.engine = engine
        self.slots, self.draft_tokens, self.max_queue = slots, draft_tokens, max_queue
        self.totals: Counter[str] = Counter()
        self.broken = ""
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._in_flight: set[Ticket] = set()
        self._active: dict[Any, Ticket] = {}  # engine thread only
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._inbox.put(("stop", None))
        self._thread.join(timeout=30)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def running(self) -> int:
        return min(len(self._in_flight), self.slots)

    @property
    def waiting(self) -> int:
        return max(0, len(self._in_flight) - self.slots)

    def has_room(self, num_requests: int) -> bool:
        return len(self._in_flight) + num_requests <= self.slots + self.max_queue

    def submit(self, sink: Sink, prompt_ids: list[int], params: Any) -> Ticket:
        """Queue one request; `sink` hears of it on the event loop."""
        ticket = Ticket(sink, prompt_ids, params)
        self._in_flight.add(ticket)
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += len(prompt_ids)
        self._inbox.put(("submit", ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request whose client is gone, or whose text is complete; its slot is free after the current step."""
        if ticket.finished:
            return
        self._finish(ticket)
        self._inbox.put(("cancel", ticket))

    def _finish(self, ticket: Ticket) -> None:
        ticket.finished = True
        self._in_flight.discard(ticket)

    # The engine thread

    def run(self) -> None:
        """Step while there is work, sleep on the queue while there is none."""
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + YIELDS)
        failed_steps = 0
        while True:
            try:
                while not self.engine.has_work or not self._inbox.empty():
                    if not self._take(*self._inbox.get()):
                        return
                events = self.engine.step()
                failed_steps = 0
            except Exception as error:  # noqa: BLE001 - the engine's boundary: its failure must not end the server
                failed_steps += 1
                log.exception("engine step failed (%d in a row)", failed_steps)
                self._fail_all(error, failed_steps)
                continue
            if events:
                self._call(self._deliver, [(self._owner(event), event) for event in events])

    def _owner(self, event: Any) -> Ticket | None:
        if event.finish_reason is None:
            return self._active.get(event.request_id)
        return self._active.pop(event.request_id, None)

    def _take(self, what: str, ticket: Ticket | None) -> bool:
        if ticket is None:
            return False
        if what == "cancel":
            if self._active.pop(ticket.request_id, None) is not None:
                self.engine.cancel(ticket.request_id)
            return True
        if ticket.finished:  # cancelled while it was still in the queue
            return True
        try:
            ticket.request = self.engine.submit(ticket.prompt_ids, ticket.params)
            ticket.request_id = ticket.request.id
        except Exception as error:  # noqa: BLE001 - whatever the engine dislikes about one request concerns only that one
            self._call(self._fault, [ticket], EngineFault(str(error) or type(error).__name__, 400))
            return True
        self._active[ticket.request_id] = ticket
        return True

    def _fail_all(self, error: Exception, failed_steps: int) -> None:
        tickets = list(self._active.values())
        self._active.clear()
        for ticket in tickets:
            try:
                self.engine.cancel(ticket.request_id)
            except Exception:  # noqa: BLE001 - already failing; the slot may be lost, the server is not
                log.exception("cancel after a failed step failed too")
        if failed_steps >= MAX_FAILED_STEPS:
            self.broken = f"{failed_steps} engine steps failed in a row, the last with: {error}"
        self._call(self._fault, tickets, EngineFault(f"the engine failed: {error}"))

    def _call(self, function: Any, *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop closed while the last step ran: the server is ending
            log.info("event loop is closed; events dropped")

    # The event loop

    def _deliver(self, events: list[tuple[Ticket | None, Any]]) -> None:
        totals = self.totals
        for ticket, event in events:
            if ticket is None or ticket.finished:  # cancelled while this step ran
                continue
            reason = event.finish_reason
            num_tokens = len(event.token_ids)
            totals["generation_tokens"] += num_tokens
            if reason is not None:
                self._finish(ticket)
                totals["cycles"] += ticket.cycles
                totals["reused_tokens"] += ticket.reused
                for at, count in enumerate(ticket.accepted, 1):
                    totals[f"accepted_{at}"] += count
            if reason in ("error", "nan"):
                totals["faults"] += 1
                ticket.sink.on_fault(EngineFault("the model produced NaN or infinite logits for this request"))
            else:
                ticket.sink.on_step(num_tokens, event.text, reason)

    def _fault(self, tickets: list[Ticket], fault: EngineFault) -> None:
        for ticket in tickets:
            if not ticket.finished:
                self._finish(ticket)
                self.totals["faults"] += 1
                ticket.sink.on_fault(fault)
