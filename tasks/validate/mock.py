"""A mock OpenAI-compatible server that streams on a schedule known beforehand, and that misbehaves on request.

It is a process of its own, one thread over non-blocking sockets. A reply is made whole beforehand and cut by due
time: a late loop sends what is due at once instead of sliding the schedule. The last event carries the times at which
it really sent the first and the last token (system-wide monotonic clock), so that the client's error can be told from
the mock's; `GET /truth` has the true tokens/s of every finished stream, for clients that do not look there.

It refuses to be a model: it answers prompts from a file, or with a fixed word.

Run: `python -m tasks.validate.mock --tokens-per-s 5000 --ttft-ms 20 --tokens 1000` (prints its port on the first line)
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

clock = time.perf_counter

FAULTS = (
    "",
    "stall",
    "reset",
    "utf8",
    "split_utf8",
    "usage",
    "no_usage",
    "malformed",
    "429",
    "503",
    "503_once",
    "empty",
)


@dataclass(frozen=True)
class MockPlan:
    """What it streams, and when. `pattern` is the number of tokens in each chunk, repeated."""

    ttft_ms: float = 20.0
    tokens_per_s: float = 5000.0
    tokens: int = 1000
    pattern: tuple[int, ...] = (3, 2, 4, 1)
    word: str = " a"
    draft_tokens: int = 3
    fault: str = ""
    answers: str = ""  # JSON lines with prompt and answer
    tokenizer: str = (
        ""  # a tokenizer.json, to cut answers into true tokens; without it twelve pieces pass for 36 tokens
    )
    wrong_every: int = 0  # every nth problem of the file is answered wrongly
    serial: bool = False  # one request at a time: the others queue, as behind a stalled engine


@dataclass(frozen=True)
class Schedule:
    """A whole reply made beforehand: event i ends at `ends[i]` in `blob` and is due `offsets_s[i]` after the first
    token.
    """

    offsets_s: list[float]
    ends: list[int]
    blob: bytes
    usage: dict[str, Any]
    text: str


@dataclass
class Stream:
    """One connection: the schedule of its reply, and how far it is."""

    sock: socket.socket
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)
    schedule: Schedule | None = None
    base_s: float = 0.0  # when the first token is due
    sent: int = 0  # events of the schedule
    stop_at: int = -1  # a fault strikes at this event
    first_sent_s: float = 0.0
    last_sent_s: float = 0.0


class MockServer:
    """The loop. `serve()` returns never; it ends with its process."""

    def __init__(self, plan: MockPlan, port: int = 0) -> None:
        self.plan = plan
        self.listener = socket.create_server(("127.0.0.1", port), backlog=512)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.streams: dict[int, Stream] = {}
        self.refused = 0
        self.busy_until_s = 0.0
        self.answers: dict[str, str] = {}
        self.cache: dict[tuple[str, int | None, bool], Schedule] = {}
        self.true_tps: list[float] = []
        self.tokenizer: Any = None
        if plan.answers:
            self._read_answers()
        if plan.tokenizer:
            from tokenizers import Tokenizer  # only here: the self-test's mock must start at once

            self.tokenizer = Tokenizer.from_file(plan.tokenizer)

    def _read_answers(self) -> None:
        lines = Path(self.plan.answers).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(filter(None, lines)):
            problem = json.loads(line)
            wrong = self.plan.wrong_every and number % self.plan.wrong_every == 0
            self.answers[problem["prompt"]] = "Answer: wrong" if wrong else problem["answer"]

    def serve(self) -> None:
        while True:
            now, next_due = clock(), float("inf")
            for stream in list(self.streams.values()):
                next_due = min(next_due, self._advance(stream, now))
            writers = [s.sock for s in self.streams.values() if s.outbox]
            wait = min(max(next_due - clock(), 0.0), 1.0)
            readers = [self.listener, *(s.sock for s in self.streams.values())]
            readable, _, _ = select.select(readers, writers, [], wait)
            for sock in readable:
                if sock is self.listener:
                    self._accept()
                else:
                    self._read(self.streams[sock.fileno()])

    def _accept(self) -> None:
        sock, _ = self.listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.streams[sock.fileno()] = Stream(sock)

    def _drop(self, stream: Stream, reset: bool = False) -> None:
        self.streams.pop(stream.sock.fileno(), None)
        if reset:
            stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream.sock.close()

    def _read(self, stream: Stream) -> None:
        try:
            data = stream.sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._drop(stream)
            return
        stream.inbox += data
        head, found, rest = bytes(stream.inbox).partition(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":", 1)[1])
        if found and len(rest) >= length:
            del stream.inbox[: len(head) + 4 + length]
            self._answer(stream, head.split(b" ", 2)[1].decode(), rest[:length])

    def _advance(self, stream: Stream, now: float) -> float:
        """Sends what is due; returns the next due time."""
        plan, closing = stream.schedule, False
        if plan is not None and now >= stream.base_s + plan.offsets_s[stream.sent]:
            due = bisect_right(plan.offsets_s, now - stream.base_s)
            if 0 <= stream.stop_at <= due:
                if self.plan.fault == "reset":
                    self._drop(stream, reset=True)
                    return float("inf")
                due = stream.stop_at
            begin = plan.ends[stream.sent - 1] if stream.sent else 0
            stream.outbox += plan.blob[begin : plan.ends[due - 1]]
            stream.sent = due
            closing = due == len(plan.ends)
        if stream.outbox and not self._flush(stream, tokens=plan is not None):
            return now + 0.0005 if stream.outbox else float("inf")
        if closing:  # written only now: the last token has left, and when is known
            stream.outbox += self._closing(stream)
            stream.schedule = plan = None
            self._flush(stream, tokens=False)
        if plan is None or stream.sent == stream.stop_at:
            return float("inf")
        return stream.base_s + plan.offsets_s[stream.sent]

    def _flush(self, stream: Stream, tokens: bool) -> bool:
        try:
            del stream.outbox[: stream.sock.send(stream.outbox)]
        except BlockingIOError:
            return False
        except OSError:
            stream.outbox.clear()
            self._drop(stream)
            return False
        if tokens:
            stream.last_sent_s = clock()
            stream.first_sent_s = stream.first_sent_s or stream.last_sent_s
        return True

    def _answer(self, stream: Stream, path: str, body: bytes) -> None:
        plan, now = self.plan, clock()
        if path.endswith("/truth"):
            stream.outbox += _plain(200, {"tps": self.true_tps})
        elif not path.endswith("completions"):
            payload: dict[str, Any] = {"data": [{"id": "mock"}]} if path.endswith("/models") else {"status": "ok"}
            stream.outbox += _plain(200, payload)
        elif plan.fault in ("429", "503") or (plan.fault == "503_once" and self.refused == 0):
            self.refused += 1
            code = 429 if plan.fault == "429" else 503
            stream.outbox += _plain(code, {"error": {"message": "busy"}}, "Retry-After: 0.05\r\n")
        else:
            self._plan_reply(stream, json.loads(body), now, chat="chat" in path)
        self._advance(stream, now)

    def _pieces(self, ask: dict[str, Any]) -> list[tuple[int, str]]:
        """(number of tokens, text) of each chunk."""
        messages = ask.get("messages")
        prompt = messages[-1]["content"] if messages else ask.get("prompt", "")
        if isinstance(prompt, list):  # content in parts, as some clients send it
            prompt = "".join(part.get("text", "") for part in prompt)
        if prompt in self.answers:
            text = self.answers[prompt]
            if self.tokenizer is not None:
                return self._token_pieces(text)
            size = max(1, len(text) // 12)
            return [(3, text[i : i + size]) for i in range(0, len(text), size)]
        pieces, left, turn = [], min(self.plan.tokens, ask.get("max_tokens") or self.plan.tokens), 0
        while left > 0:
            size = min(left, self.plan.pattern[turn % len(self.plan.pattern)])
            pieces.append((size, self.plan.word * size))
            left, turn = left - size, turn + 1
        return pieces

    def _token_pieces(self, text: str) -> list[tuple[int, str]]:
        ends = [end for _, end in self.tokenizer.encode(text, add_special_tokens=False).offsets]
        pieces, done, turn = [], 0, 0
        while done < len(ends):
            size = min(self.plan.pattern[turn % len(self.plan.pattern)], len(ends) - done)
            pieces.append((size, text[ends[done - 1] if done else 0 : ends[done + size - 1]]))
            done, turn = done + size, turn + 1
        return pieces

    def _schedule(self, ask: dict[str, Any], chat: bool) -> Schedule:
        pieces = self._pieces(ask)
        done, offsets, blob, ends = 0, [], bytearray(), []
        for index, (size, text) in enumerate(pieces):
            offsets.append((done + size - pieces[0][0]) / self.plan.tokens_per_s)
            blob += self._chunk(text, index, chat)
            ends.append(len(blob))
            done += size
        usage = _usage(pieces, self.plan.draft_tokens)
        if self.plan.fault == "usage":
            usage["completion_tokens"] += 7
        return Schedule(offsets, ends, bytes(blob), usage, "".join(text for _, text in pieces))

    def _plan_reply(self, stream: Stream, ask: dict[str, Any], now: float, chat: bool) -> None:
        plan = self.plan
        key = (str(ask.get("messages") or ask.get("prompt")) if self.answers else "", ask.get("max_tokens"), chat)
        schedule = self.cache[key] = self.cache.get(key) or self._schedule(ask, chat)
        starts = max(now, self.busy_until_s) if plan.serial else now
        stream.base_s, stream.first_sent_s, stream.sent = starts + plan.ttft_ms / 1e3, 0.0, 0
        self.busy_until_s = stream.base_s + schedule.offsets_s[-1]
        if ask.get("stream"):
            stream.schedule = schedule
            stream.outbox += b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            stream.stop_at = len(schedule.ends) // 2 if plan.fault in ("stall", "reset") else -1
            self._flush(stream, tokens=False)
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": schedule.text}}
        body = {"id": "mock", "choices": [{**choice, "text": schedule.text}], "usage": schedule.usage}
        wait = max(stream.base_s - now, 0) + schedule.offsets_s[-1]
        stream.schedule, stream.base_s = _whole(_plain(200, body)), now + wait

    def _chunk(self, text: str, index: int, chat: bool) -> bytes:
        fault = self.plan.fault
        if fault == "empty":
            text = ""
        if fault == "split_utf8":  # a server that decodes token by token and cuts a character in two
            text = "\ufffd" if index % 2 else text
        choice = {"index": 0, "finish_reason": None, **({"delta": {"content": text}} if chat else {"text": text})}
        kind = "chat.completion.chunk" if chat else "text_completion"  # other clients insist on it
        data = json.dumps({"id": "mock", "object": kind, "choices": [choice]}, ensure_ascii=False).encode()
        if index == 2 and fault == "utf8":
            data = data.replace(b'": "', b'": "\xc3', 1)
        if index == 2 and fault == "malformed":
            data = data[:-3]
        return _sse(data)

    def _closing(self, stream: Stream) -> bytes:
        if stream.schedule is None or not stream.schedule.usage:
            return b""
        truth = {"first_sent_s": stream.first_sent_s, "last_sent_s": stream.last_sent_s}
        schedule, span_s = stream.schedule, stream.last_sent_s - stream.first_sent_s
        if span_s > 0:
            self.true_tps.append(round(schedule.offsets_s[-1] * self.plan.tokens_per_s) / span_s)
        head = {"id": "mock", "object": "chat.completion.chunk"}
        finish = {**head, "choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]}
        usage = {**head, "choices": [], "usage": stream.schedule.usage, "mock": truth}
        tail = b"" if self.plan.fault == "no_usage" else _sse(json.dumps(usage).encode())
        return _sse(json.dumps(finish).encode()) + tail + _sse(b"[DONE]") + b"0\r\n\r\n"


def _whole(reply: bytes) -> Schedule:
    """A reply that does not stream is one event, with nothing after it."""
    return Schedule([0.0], [len(reply)], reply, {}, "")


def _usage(pieces: list[tuple[int, str]], draft_tokens: int) -> dict[str, Any]:
    total = sum(size for size, _ in pieces)
    by_position = [sum(size - 1 > i for size, _ in pieces[1:]) for i in range(draft_tokens)]
    cycles, accepted = max(len(pieces) - 1, 0), sum(by_position)
    return {
        "prompt_tokens": 8,
        "completion_tokens": total,
        "total_tokens": 8 + total,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": cycles * draft_tokens - accepted,
        },
        "speculation": {"draft_tokens": draft_tokens, "cycles": cycles, "accepted_by_position": by_position},
    }


def _sse(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


def _plain(status: int, body: dict[str, Any], extra: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Mock\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextmanager
def mock_server(plan: MockPlan) -> Iterator[str]:
    """Base URL of a mock in its own process, so that client and mock do not share an interpreter lock."""
    argv = [sys.executable, "-m", "tasks.validate.mock", "--plan", json.dumps(asdict(plan))]
    folder = Path(__file__).resolve().parents[2]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port.isdigit():
                raise OSError(f"the mock server did not start (exit {process.poll()})")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Mock OpenAI-compatible server of known timing")
    parser.add_argument("--plan", help="a MockPlan as JSON")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--tokens-per-s", type=float, default=5000.0)
    parser.add_argument("--ttft-ms", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--fault", choices=FAULTS, default="")
    given = parser.parse_args(argv)
    plan = MockPlan(given.ttft_ms, given.tokens_per_s, given.tokens, fault=given.fault)
    if given.plan:
        values = json.loads(given.plan)
        plan = MockPlan(**{**values, "pattern": tuple(values["pattern"])})
    server = MockServer(plan, given.port)
    print(server.port, flush=True)
    server.serve()


if __name__ == "__main__":
    main()
