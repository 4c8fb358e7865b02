"""Load profiles: one request in flight, N parallel users, open-loop arrivals.

Closed loops answer "how fast is it for one of N users". Only the open loop answers "how long do users wait at this
arrival rate": its latency counts from the moment a request was meant to be sent, so a stalled server cannot make the
client leave out the requests that would have suffered (coordinated omission).

It refuses to run without bounds: every request has the endpoint's limits, the open loop has a cap on what is in flight.

Run: `python -m tasks.validate.selftest`
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tasks.validate.client import Ask, Endpoint, Exchange, Link, measure, send
from tasks.validate.wire import HttpReply, RawReply, clock, parse_reply

RAW_LIMIT_BYTES = 256 << 20  # unparsed replies kept in memory; beyond it they are parsed during the run
GIVE_UP_AFTER = 3  # requests in a row without a whole reply
Rows = list[dict[str, Any]]
OnDone = Callable[[int], None]


class _Collector:
    """Keeps replies unparsed until the run is over, so that parsing one user's reply does not delay another's clock."""

    def __init__(self, endpoint: Endpoint, profile: str, on_done: OnDone | None) -> None:
        self.endpoint, self.profile, self.on_done = endpoint, profile, on_done
        self.pending: list[Exchange] = []
        self.rows: Rows = []
        self.held_bytes, self.finished, self.failed_in_a_row = 0, 0, 0

    def add(self, exchange: Exchange) -> None:
        self.pending.append(exchange)
        self.held_bytes += len(exchange.raw.blob)
        self.finished += 1
        self.failed_in_a_row = self.failed_in_a_row + 1 if exchange.raw.error else 0
        if self.on_done:
            self.on_done(self.finished)
        if self.held_bytes > RAW_LIMIT_BYTES:
            self.parse()

    @property
    def hopeless(self) -> bool:
        """A dead server would otherwise cost its time limit once per prompt."""
        return self.failed_in_a_row >= GIVE_UP_AFTER

    def parse(self) -> Rows:
        self.rows += [measure(exchange, self.endpoint.count, self.profile) for exchange in self.pending]
        self.pending, self.held_bytes = [], 0
        return self.rows


def one_in_flight(endpoint: Endpoint, asks: Sequence[Ask], on_done: OnDone | None = None) -> Rows:
    """The record's method: unique prompts, one after the other on one connection."""
    return parallel_users(endpoint, asks, 1, "one_in_flight", on_done)


def parallel_users(
    endpoint: Endpoint, asks: Sequence[Ask], users: int, profile: str = "", on_done: OnDone | None = None
) -> Rows:
    """`users` connections; each takes the next prompt as soon as its last answer ended."""
    collector = _Collector(endpoint, profile or f"parallel_{users}", on_done)
    queue = list(reversed(asks))

    async def user(number: int, link: Link) -> None:
        while queue and not collector.hopeless:
            collector.add(await send(endpoint, queue.pop(), link, user=number))

    async def run() -> None:
        links = [Link(endpoint) for _ in range(min(users, len(asks)))]
        await asyncio.gather(*(link.open() for link in links))  # connecting is not part of any request's time
        try:
            await asyncio.gather(*(user(number, link) for number, link in enumerate(links)))
        finally:
            for link in links:
                link.close()

    _measured(run())
    return collector.parse()


def open_loop(
    endpoint: Endpoint, asks: Sequence[Ask], rate_per_s: float, seed: int = 0, max_in_flight: int = 512
) -> Rows:
    """Poisson arrivals at `rate_per_s`. Beyond `max_in_flight` a request waits, and its wait counts."""
    collector = _Collector(endpoint, f"open_loop_{rate_per_s:g}", None)
    gaps = random.Random(seed)
    idle: list[Link] = []

    async def one(ask: Ask, intended_s: float, room: asyncio.Semaphore) -> None:
        async with room:
            link = idle.pop() if idle else Link(endpoint)
            collector.add(await send(endpoint, ask, link, intended_s))
            idle.append(link)

    async def run() -> None:
        room, running, due = asyncio.Semaphore(max_in_flight), [], clock()
        for ask in asks:
            if collector.hopeless:
                break
            due += gaps.expovariate(rate_per_s)
            await asyncio.sleep(max(due - clock(), 0))
            running.append(asyncio.create_task(one(ask, due, room)))
        await asyncio.gather(*running)
        for link in idle:
            link.close()

    _measured(run())
    return collector.parse()


def _measured(work: Coroutine[Any, Any, None]) -> None:
    """Without the garbage collector: its pauses would be counted as the server's."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        asyncio.run(work)
    finally:
        if was_enabled:
            gc.enable()


def fetch(endpoint: Endpoint, path: str) -> HttpReply | None:
    """One GET; None when there is no whole answer. For health and counters."""

    async def run() -> RawReply:
        link = Link(endpoint)
        try:
            return await link.exchange(endpoint.address.request("GET", path, headers=endpoint.headers()))
        finally:
            link.close()

    raw = asyncio.run(run())
    if raw.error:
        return None
    try:
        return parse_reply(raw)
    except ValueError:
        return None
