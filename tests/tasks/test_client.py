"""The streaming client: right under speculation, and never a pass for a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.validate.client import FATAL, Ask, Endpoint, Exchange, Limits, measure, token_counter
from tasks.validate.load import fetch, one_in_flight, open_loop, parallel_users
from tasks.validate.mock import MockPlan, mock_server
from tasks.validate.selftest import count_words, self_test
from tasks.validate.wire import Address, RawReply, parse_reply, sse_events

FAST = MockPlan(ttft_ms=5, tokens_per_s=5000, tokens=100)
QUICK = Limits(connect_s=1, stall_s=0.3, total_s=2, retries=2, retry_after_s=0.1)


def endpoint(url: str, limits: Limits = QUICK) -> Endpoint:
    return Endpoint(url, "mock", count_words, limits=limits)


def asks(number: int) -> list[Ask]:
    return [Ask(f"p{index}", f"prompt {index}", "d", max_tokens=1000) for index in range(number)]


# -- timing
@pytest.mark.parametrize("users, requests", [(1, 2), (16, 1)])
def test_the_client_times_a_known_stream(users: int, requests: int) -> None:
    result = self_test(users, requests=requests)
    assert result["error_percent"] < 3
    assert result["ttft_error_ms"] < 5


def test_tokens_are_counted_not_chunks() -> None:
    with mock_server(FAST) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert (row["output_tokens"], row["usage_tokens"], row["first_chunk_tokens"]) == (100, 100, 3)
    assert row["chunks"] == 40  # pattern 3, 2, 4, 1: ten tokens in four chunks
    assert row["findings"] == ""
    assert row["ok"]


def test_acceptance_is_the_requests_own() -> None:
    with mock_server(FAST) as url:
        rows = one_in_flight(endpoint(url), asks(2))
    for row in rows:
        assert row["cycles"] == 39
        assert row["accepted"] == sum(row["accepted_by_position"]) == 97 - 39


def test_a_stalled_server_cannot_hide_behind_a_closed_loop() -> None:
    """Coordinated omission: one request at a time, so arrivals queue; only the open loop sees how long they wait."""
    slow = replace(FAST, ttft_ms=50, tokens=10, serial=True)
    patient = replace(QUICK, stall_s=10, total_s=20)
    with mock_server(slow) as url:
        closed = parallel_users(endpoint(url, patient), asks(20), users=1)
        opened = open_loop(endpoint(url, patient), asks(20), rate_per_s=100)
    assert max(row["ttft_intended_ms"] for row in closed) < 120
    assert max(row["ttft_intended_ms"] for row in opened) > 500  # 20 requests of 50 ms arrive within 0.2 s
    assert all(row["ok"] for row in opened)


# -- servers that misbehave
FAULTS = {
    "stall": "stall",
    "reset": "reset",
    "utf8": "invalid_utf8",
    "malformed": "malformed_json",
    "empty": "no_text",
    "429": "throttled",
    "503": "throttled",
}


@pytest.mark.parametrize("fault, finding", FAULTS.items())
def test_a_broken_reply_is_named_and_never_ok(fault: str, finding: str) -> None:
    with mock_server(replace(FAST, fault=fault)) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert finding in row["findings"].split(";")
    assert finding in FATAL
    assert not row["ok"]


@pytest.mark.parametrize(
    "fault, finding",
    [("usage", "usage_mismatch"), ("no_usage", "usage_missing"), ("split_utf8", "replacement_character")],
)
def test_a_count_that_cannot_be_trusted_is_a_finding(fault: str, finding: str) -> None:
    with mock_server(replace(FAST, fault=fault)) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert finding in row["findings"].split(";")


def test_a_dead_server_does_not_cost_its_time_limit_for_every_prompt() -> None:
    with mock_server(replace(FAST, fault="stall")) as url:
        rows = one_in_flight(endpoint(url), asks(50))
    assert len(rows) == 3


def test_retry_after_is_obeyed_and_recorded() -> None:
    with mock_server(replace(FAST, fault="503_once")) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert row["ok"]
    assert (row["retries"], row["findings"]) == (1, "retried")
    assert row["ttft_intended_ms"] > row["ttft_ms"] + 40  # the wait is the user's


def test_no_server_is_a_finding() -> None:
    (row,) = one_in_flight(endpoint("http://127.0.0.1:9"), asks(1))
    assert (row["findings"], row["ok"]) == ("connect", False)
    assert fetch(endpoint("http://127.0.0.1:9"), "/health") is None


@contextmanager
def scripted(reply: list[bytes], pause_s: float = 0.0) -> Iterator[str]:
    """A server that answers any request with these writes, then closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        for piece in reply:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False).encode() + b"\n\n"


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def test_a_character_cut_by_the_network_is_whole_again() -> None:
    whole = HEAD + chunk(event("naïve ") + event("café ") + b"data: [DONE]\n\n") + b"0\r\n\r\n"
    with scripted([bytes([byte]) for byte in whole]) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert row["text"] == "naïve café "
    assert row["ok"]


def test_a_stream_that_ends_without_an_end_is_truncated() -> None:
    with scripted([HEAD + chunk(event("half ")) + b"0\r\n\r\n"]) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert "truncated_stream" in row["findings"]


def test_a_stream_cut_inside_a_chunk_is_a_reset() -> None:
    with scripted([HEAD + b"ff\r\n" + event("half ")]) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert "reset" in row["findings"]


def test_an_endless_drip_ends_at_the_total_limit() -> None:
    with scripted([HEAD, *[chunk(event("a "))] * 100], pause_s=0.05) as url:
        (row,) = one_in_flight(endpoint(url, replace(QUICK, total_s=0.5)), asks(1))
    assert "timeout" in row["findings"]


@pytest.mark.parametrize("noise", [b"hello\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"])
def test_what_is_not_http_is_named(noise: bytes) -> None:
    with scripted([noise]) as url:
        (row,) = one_in_flight(endpoint(url), asks(1))
    assert not row["ok"]
    assert "malformed_http" in row["findings"] or "reset" in row["findings"]


# -- parsing
def raw(pieces: list[bytes]) -> RawReply:
    reply = RawReply()
    for number, piece in enumerate(pieces):
        reply.blob += piece
        reply.ends.append(len(reply.blob))
        reply.times_s.append(float(number))
    return reply


def test_an_event_arrives_with_its_last_byte() -> None:
    body = chunk(event("a ")) + chunk(event("b "))
    events = sse_events(parse_reply(raw([HEAD, body[:10], body[10:-3], body[-3:], b"0\r\n\r\n"])))
    assert [time for time, _ in events] == [2.0, 3.0]  # the last three bytes are a line feed of the event and its frame


def test_events_may_end_with_carriage_returns_and_span_chunks() -> None:
    text = event("a ").replace(b"\n", b"\r\n")
    events = sse_events(parse_reply(raw([HEAD, chunk(text[:7]), chunk(text[7:]), b"0\r\n\r\n"])))
    assert [json.loads(data)["choices"][0]["delta"]["content"] for _, data in events] == ["a "]


def test_the_definition_of_tokens_per_second() -> None:
    """3 tokens in the first chunk at t=1 are 'the first'; 4 more until t=3 make 2 per second; ITLs are 1 and 1/3 s."""
    pieces = [
        HEAD,
        chunk(event("a b c ")),
        chunk(event("d ")),
        chunk(event("e f g ") + b"data: [DONE]\n\n") + b"0\r\n\r\n",
    ]
    row = measure(Exchange(Ask("x", "p"), raw(pieces), intended_s=0.0), count_words)
    assert row["tps_user"] == pytest.approx(4 / 2)
    assert row["e2e_tps"] == pytest.approx(7 / 3)
    assert row["itl_ms_p50"] == pytest.approx(1000 / 3)


def test_an_answer_that_came_at_once_has_no_speed() -> None:
    """A machine held the answer up and one read brought it: nine tokens in no time are no record."""
    at_once = chunk(b"".join(event(f"{word} ") for word in "bcdefghi") + b"data: [DONE]\n\n") + b"0\r\n\r\n"
    row = measure(Exchange(Ask("x", "p"), raw([HEAD, chunk(event("a ")), at_once]), 0.0), count_words)
    assert row["ok"] and "burst" in row["findings"]
    assert np.isnan(row["tps_user"])


def test_chunks_that_lay_ready_with_the_first_are_no_speed() -> None:
    """The first token was read late, five more with it: only what came at the server's own pace is timed."""
    words, times = "abcdefghijkl", [0.0] + [1.0 + 1e-5 * at for at in range(6)] + [1.5 + 0.25 * at for at in range(6)]
    chunks = [chunk(event(f"{word} ") + (b"data: [DONE]\n\n" if word == "l" else b"")) for word in words]
    exchange = Exchange(Ask("x", "p"), raw([HEAD, *chunks[:-1], chunks[-1] + b"0\r\n\r\n"]), 0.0)
    exchange.raw.times_s = times
    row = measure(exchange, count_words)
    assert (row["findings"], row["first_chunk_tokens"]) == ("usage_missing", 6)
    assert row["tps_user"] == pytest.approx(6 / (times[-1] - times[6])) and row["ttft_ms"] == pytest.approx(1000)


def test_one_token_has_no_speed() -> None:
    row = measure(
        Exchange(Ask("x", "p"), raw([HEAD, chunk(event("a ") + b"data: [DONE]\n\n") + b"0\r\n\r\n"]), 0.0), count_words
    )
    assert row["ok"]
    assert np.isnan(row["tps_user"])


def test_reasoning_counts_as_the_first_token() -> None:
    thought: dict[str, Any] = {"choices": [{"delta": {"reasoning_content": "hm "}}]}
    pieces = [
        HEAD,
        chunk(b"data: " + json.dumps(thought).encode() + b"\n\n"),
        chunk(event("a ") + b"data: [DONE]\n\n") + b"0\r\n\r\n",
    ]
    row = measure(Exchange(Ask("x", "p"), raw(pieces), 0.0), count_words)
    assert row["ttft_ms"] == pytest.approx(1000)


@pytest.mark.parametrize("url", ["http://h:1", "h:1", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_with_or_without_v1(url: str) -> None:
    assert Address.parse(url) == Address("h", 1)


def test_the_models_own_tokenizer_counts() -> None:
    count = token_counter(Path(__file__).parents[2] / "specs/models/tiny-llama4/tokenizer.json")
    text = "Answer: 42\n"
    ends = count(text)
    assert ends[-1] == len(text)
    assert len(ends) > 1
